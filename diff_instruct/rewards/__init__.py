"""Rewards r(x, c): callables `reward(pixels, prompts) -> (B,)`, differentiable in pixels (B, 3, H, W) in [0, 1].

A reward that is also asked for the diversity of images (`--heldout_reward`) has `image_features(pixels) -> (B, D)`.
"""

import json
from pathlib import Path

from diff_instruct.rewards.clip import ClipReward


POCKET = Path(__file__).resolve().parents[2] / "pocket"
REWARDS = ("pocket", "pocket_heldout", "clip")


def check_reward(name):
    """Raises ValueError for a reward that does not exist, before anything is loaded."""
    if name not in REWARDS:
        raise ValueError(f"unknown reward `{name}`; known are {', '.join(REWARDS)}")


def load_reward(name, cache_dir=None):
    """The reward of this name, frozen and in float32, on the CPU.

    `pocket` and `pocket_heldout` are the two scorers of the pocket reference (see pocket/README.md), in units of the
    spread of the reference's own samples. `clip` is the cosine of openai/clip-vit-large-patch14, times 100.
    """
    check_reward(name)
    if name == "clip":
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        return ClipReward("openai/clip-vit-large-patch14", mean, std, std=0.01, cache_dir=cache_dir)
    folder = POCKET / ("scorer" if name == "pocket" else "scorer_heldout")
    scale = json.loads((folder / "reward.json").read_text())
    return ClipReward(str(folder), [0.5] * 3, [0.5] * 3, mean=scale["mean"], std=scale["std"])
