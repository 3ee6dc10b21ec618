"""What all published rewards share: frozen networks, a tokenizer with a limit, image features."""

import logging
import zlib

import torch


logger = logging.getLogger(__name__)


class Scorer(torch.nn.Module):
    """A frozen network that scores images.

    Subclasses have `forward(pixels, prompts) -> (B,)`, in the unit in which the scorer's tables are published, and
    `image_features(pixels) -> (B, D)`, unit vectors that diversity is measured with. They stay in eval mode, but
    gradients go through them to the pixels: (B, 3, H, W), nominally in [0, 1], any size.

    Args:
        name (`str`): as in `--reward`.
        tokenizer, max_length (`int`): prompts are cut at that many tokens.
        padding: as the tokenizer's argument of that name.
    """

    def __init__(self, name, tokenizer=None, max_length=None, padding=True):
        super().__init__()
        self.name, self.tokenizer, self.max_length, self.padding = name, tokenizer, max_length, padding
        self.truncated_prompts = set()  # checksums, so that each prompt counts once, in all processes together

    def train(self, mode=True):
        """Dropout would make scores random: always eval."""
        return super().train(False)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device

    def tokenize(self, prompts):
        """Token ids and attention mask, (B, L) each, of B prompts."""
        prompts = list(prompts)
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"]]
        cut = {zlib.crc32(p.encode()) for p, length in zip(prompts, lengths) if length > self.max_length}
        if cut and not self.truncated_prompts:
            logger.warning(
                f"reward `{self.name}` reads {self.max_length} tokens: what a prompt says after that does not count. "
                "How many prompts were cut is in the summary at the end."
            )
        self.truncated_prompts |= cut
        return self.tokenizer(
            prompts, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
