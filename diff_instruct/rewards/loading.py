"""Rewards r(x, c): callables `reward(pixels, prompts) -> (B,)`, differentiable in pixels (B, 3, H, W) in [0, 1]."""

import torch
from accelerate.utils import gather_object

from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.function import FunctionReward
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.remote import RemoteReward
from diff_instruct.rewards.urls import is_url


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of `--reward_dtype`


def load_reward(spec, device="cpu", dtype=torch.float32, cache_dir=None, trained=True):
    """The reward of a [`RewardSpec`], without its weight and cap, frozen, on `device` in `dtype`.

    A user's own function or a judge elsewhere is tried on two random pictures, with its gradient if it is `trained` by
    that; it stays in its dtype.

    Raises:
        Mistake: for a checkpoint that is not there or incomplete, a function that cannot work.
    """
    if spec.published is not None:
        return spec.published.load(spec.name, spec.checkpoint, cache_dir).to(device, dtype)
    if is_url(spec.name):
        reward = RemoteReward(spec.name, spec.timeout, spec.retries)
    else:
        reward = FunctionReward(spec.name).to(device)
    reward.check(device, trained)
    return reward


def load_mix(specs, device, dtype=torch.float32, cache_dir=None, by_gradient=True):
    """The `Mix` of trained rewards, [`RewardSpec`] each, with their weights and caps. Raises as `load_reward`.

    Args:
        by_gradient: whether they are trained on by their gradients, not by their numbers.
    """
    rewards = {spec.label: load_reward(spec, device, dtype, cache_dir, by_gradient) for spec in specs}
    caps = {spec.label: spec.cap for spec in specs if spec.cap is not None}
    standardized = [spec.label for spec in specs if spec.standardized]
    return Mix(rewards, {spec.label: spec.weight for spec in specs}, caps, standardized)


def load_scorers(specs, device, cache_dir=None):
    """A `dict`, by label, of scorers that only report, in float32; empty for no specs. Raises as `load_reward`."""
    return {spec.label: load_reward(spec, device, cache_dir=cache_dir, trained=False) for spec in specs}


def truncated_prompts(reward, heldout):
    """How many different prompts each scorer read in part only, over all processes; those that cut none are left out.

    Args:
        reward ([`Mix`]), heldout (`dict`): what `load_mix` and `load_scorers` returned.
    """
    scorers = {**dict(zip(reward.names, reward.rewards)), **heldout}
    cut = {name: gather_object(list(s.truncated_prompts)) for name, s in scorers.items() if isinstance(s, Scorer)}
    return {name: len(set(checksums)) for name, checksums in cut.items() if checksums}
