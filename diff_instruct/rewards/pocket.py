"""The two scorers of the pocket reference (see pocket/README.md)."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.clip import ClipScorer
from diff_instruct.rewards.weights import clip_network


class PocketReward(ClipScorer):
    """(cosine − mean) / std: in units of the spread of the reference's own samples."""

    def __init__(self, name, model, tokenizer, mean=0.0, std=1.0):
        super().__init__(name, model, tokenizer, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
        self.mean, self.std = mean, std

    @classmethod
    def from_pretrained(cls, name, path, cache_dir=None):
        """From a folder with the CLIPModel, its tokenizer and `reward.json`, which holds mean and std.

        Raises:
            Mistake: if the folder is not such a one.
        """
        try:
            scale = json.loads((Path(path) / "reward.json").read_text())
        except (OSError, ValueError):
            raise Mistake(f"--reward_checkpoint {name}={path}: no reward.json with mean and std is there") from None
        return cls(name, clip_network(name, path, "pocket"), AutoTokenizer.from_pretrained(path), **scale)

    @classmethod
    def unscaled(cls, folder):
        """The cosine itself, from a folder without `reward.json`: mean and std are measured with it."""
        return cls("pocket", clip_network("pocket", folder, "pocket"), AutoTokenizer.from_pretrained(folder))

    def forward(self, pixels, prompts):
        """Reward (B,) of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        return (super().forward(pixels, prompts) - self.mean) / self.std
