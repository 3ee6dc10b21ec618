"""The truth of the pocket world as a scorer (see `pocket.truth`): for evaluation, never for training."""

import torch

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.pocket import PocketReward
from pocket.truth import meanings_of, measure
from pocket.world import parse


class PocketTruth(Scorer):
    """The share of what a prompt says that its picture shows: background, noun and, where one is said, colour.

    Args:
        scorer ([`PocketReward`]): what the noun is measured with; nothing may be trained on it.
    """

    def __init__(self, scorer):
        super().__init__("pocket_truth", scorer.tokenizer, scorer.max_length)
        self.scorer, self.texts = scorer, {}

    @classmethod
    def from_pretrained(cls, path, cache_dir=None):
        """With the scorer in the folder `path`."""
        return cls(PocketReward.from_pretrained("pocket_truth", path))

    def image_features(self, pixels):
        """Unit vectors (B, D) of pixels (B, 3, H, W): those of its scorer."""
        return self.scorer.image_features(pixels)

    @staticmethod
    def can_measure(prompt):
        """Whether a prompt is a sentence of the pocket world."""
        return parse(prompt) is not None

    def measure(self, pixels, prompts):
        """`background`, `colour` and `noun`, (B,) each, 1 if right (see `pocket.truth.measure`).

        Raises:
            Mistake: for a prompt that is not a sentence of the pocket world.
        """
        try:
            meanings = meanings_of(prompts)
        except ValueError as error:
            raise Mistake(f"reward `pocket_truth`: {error}") from error
        return measure(pixels.float().clamp(0, 1), meanings, self.scorer, self.texts)

    @torch.no_grad()
    def forward(self, pixels, prompts):
        """Shares (B,), 0 to 1, of pixels (B, 3, H, W) in [0, 1] for B prompts; without gradient."""
        return torch.stack(list(self.measure(pixels, prompts).values())).nanmean(dim=0)
