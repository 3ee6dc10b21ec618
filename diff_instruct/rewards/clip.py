"""Scorers on transformers' `CLIPModel`, and the first of them: CLIPScore (Hessel et al., arXiv 2104.08718)."""

import torch.nn.functional as F
from transformers import CLIPTokenizer

from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.pixels import CLIP_MEAN, CLIP_STD, centre_square, full_precision, normalise
from diff_instruct.rewards.weights import clip_network, load_tokenizer


class ClipScorer(Scorer):
    """The cosine of image and prompt, differentiable in the pixels.

    Args:
        name (`str`), tokenizer: see `Scorer`.
        model (`CLIPModel`): prompts are cut at the length of its position embeddings.
        square: how pixels become a square of the model's size, a function of `pixels.py`.
        pixel_mean, pixel_std: three numbers each, for pixels in [0, 1].
    """

    def __init__(self, name, model, tokenizer, square=centre_square, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD):
        super().__init__(name, tokenizer, model.config.text_config.max_position_embeddings)
        self.model, self.square, self.pixel_mean, self.pixel_std = model, square, pixel_mean, pixel_std
        self.requires_grad_(False).eval()

    def image_features(self, pixels):
        """Unit vectors (B, D) of pixels (B, 3, H, W)."""
        pixels = self.square(pixels, self.model.config.vision_config.image_size)
        pixels = normalise(pixels, self.pixel_mean, self.pixel_std).to(self.dtype)
        return F.normalize(full_precision(self.model.get_image_features(pixels).pooler_output), dim=-1)

    def text_features(self, prompts):
        """Unit vectors (B, D) of a list of B prompts."""
        tokens = self.tokenize(prompts)
        features = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(full_precision(features), dim=-1)

    def forward(self, pixels, prompts):
        """Cosine (B,) of pixels (B, 3, H, W) and B prompts."""
        return (self.image_features(pixels) * self.text_features(prompts)).sum(dim=-1)


class ClipScore(ClipScorer):
    """100 · max(cosine, 0) with OpenAI's CLIP ViT-L/14; below 0 the gradient is that of 100 · cosine."""

    REPO = "openai/clip-vit-large-patch14"

    @classmethod
    def from_pretrained(cls, path=None, cache_dir=None):
        """From the Hub, or a folder in transformers' format. Raises ValueError if it is not there or incomplete."""
        model = clip_network("clip", path, cls.REPO, cache_dir)
        return cls("clip", model, load_tokenizer(CLIPTokenizer, "clip", path, cls.REPO, cache_dir))

    def forward(self, pixels, prompts):
        """CLIPScore (B,), 0 to 100, of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        score = 100 * super().forward(pixels, prompts)
        return score + (score.clamp(min=0) - score).detach()
