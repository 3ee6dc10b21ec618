"""Rewards r(x, c): callables `reward(pixels, prompts) -> (B,)`, differentiable in pixels (B, 3, H, W) in [0, 1]."""

from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.aesthetic import Aesthetic
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.clip import ClipScore
from diff_instruct.rewards.function import FunctionReward
from diff_instruct.rewards.hpsv2 import HPSv2
from diff_instruct.rewards.image_reward import ImageReward
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.pickscore import PickScore
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.rewards.specs import parse_pairs, parse_reward, short_name


POCKET = Path(__file__).resolve().parents[2] / "pocket"


def pocket_scorer(name, folder, path=None, cache_dir=None):
    """One of the two scorers in pocket/."""
    return PocketReward.from_pretrained(name, path or POCKET / folder)


REWARDS = {
    "image_reward": ImageReward.from_pretrained,
    "hpsv2": partial(HPSv2.from_pretrained, "hpsv2"),
    "hpsv2.1": partial(HPSv2.from_pretrained, "hpsv2.1"),
    "pickscore": PickScore.from_pretrained,
    "clip": ClipScore.from_pretrained,
    "aesthetic": Aesthetic.from_pretrained,
    "pocket": partial(pocket_scorer, "pocket", "scorer"),
    "pocket_heldout": partial(pocket_scorer, "pocket_heldout", "scorer_heldout"),
}


def check_reward(spec):
    """Raises Mistake for a reward that does not exist, before anything is loaded."""
    file, is_file, _ = spec.partition(".py:")
    if is_file and not Path(f"{file}.py").is_file():
        raise Mistake(f"reward `{spec}`: no such file: {file}.py")
    if not is_file and spec not in REWARDS:
        raise Mistake(
            f"unknown reward `{spec}`; known are {', '.join(REWARDS)}, or your own as path/to/file.py:function"
        )


def check_scorers(specs, checkpoints):
    """Raises Mistake for rewards that do not exist or have one name, or `--reward_checkpoint` entries without a
    file, before anything is loaded."""
    for spec in specs:
        check_reward(spec)
    names = [short_name(spec) for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise Mistake(f"reward `{twice[0]}` is given twice; all that are trained, held out or reported must differ")
    for name, path in parse_pairs("reward_checkpoint", checkpoints).items():
        if name not in REWARDS:
            raise Mistake(f"--reward_checkpoint: unknown reward `{name}`; known are {', '.join(REWARDS)}")
        if not Path(path).exists():
            raise Mistake(f"--reward_checkpoint {name}={path}: no such file or folder")


def check_rewards(args):
    """Raises Mistake for the reward arguments that cannot work, before anything is loaded."""
    trained = [parse_reward(entry)[0] for entry in args.reward]
    heldout = args.heldout_reward or []
    check_scorers([*trained, *heldout], args.reward_checkpoint)
    for name, cap in parse_pairs("reward_cap", args.reward_cap).items():
        if name not in map(short_name, trained):
            raise Mistake(f"--reward_cap: `{name}` is not in --reward")
        try:
            float(cap)
        except ValueError:
            raise Mistake(f"--reward_cap {name}={cap}: the cap must be a number") from None
    if args.reward_warmup_steps < 0 or args.heldout_patience < 0:
        raise Mistake("--reward_warmup_steps and --heldout_patience must not be negative")
    if args.heldout_patience and not (heldout and args.validation_steps):
        raise Mistake("--heldout_patience needs a --heldout_reward, and --validation_steps to judge it at")


def load_reward(spec, path=None, cache_dir=None, trained=True, device="cpu", dtype=torch.float32):
    """The reward of this name, frozen, on `device` in `dtype`; a user's own function is tried on random pictures.

    Raises:
        Mistake: for an unknown reward, a checkpoint that is not there or incomplete, a function that cannot work.
    """
    check_reward(spec)
    if ".py:" not in spec:
        return REWARDS[spec](path=path, cache_dir=cache_dir).to(device, dtype)
    reward = FunctionReward(spec).to(device)
    reward.check(device, trained)
    return reward


def load_mix(args, device):
    """The `Mix` of `--reward`, with its caps and checkpoints, in `--reward_dtype`. Raises as `load_reward`."""
    paths = parse_pairs("reward_checkpoint", args.reward_checkpoint)
    entries = [parse_reward(entry) for entry in args.reward]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.reward_dtype]
    rewards = {short_name(s): load_reward(s, paths.get(s), args.cache_dir, True, device, dtype) for s, _ in entries}
    caps = {name: float(cap) for name, cap in parse_pairs("reward_cap", args.reward_cap).items()}
    return Mix(rewards, {short_name(s): weight for s, weight in entries}, caps)


def load_scorers(specs, checkpoints, cache_dir, device):
    """A `dict` of scorers that only report, by name, in float32. Raises as `load_reward`.

    Args:
        specs: names, or `path/to/file.py:function`.
        checkpoints: entries of `--reward_checkpoint`, or None.
    """
    paths = parse_pairs("reward_checkpoint", checkpoints)
    return {short_name(s): load_reward(s, paths.get(s), cache_dir, False, device) for s in specs}


def load_heldout(args, device):
    """The scorers of `--heldout_reward`, see `load_scorers`; may be empty."""
    return load_scorers(args.heldout_reward or [], args.reward_checkpoint, args.cache_dir, device)


def truncated_prompts(reward, heldout):
    """How many different prompts each scorer read in part only, over all processes; those that cut none are left out.

    Args:
        reward ([`Mix`]), heldout (`dict`): what `load_mix` and `load_heldout` returned.
    """
    scorers = {**dict(zip(reward.names, reward.rewards)), **heldout}
    cut = {name: gather_object(list(s.truncated_prompts)) for name, s in scorers.items() if isinstance(s, Scorer)}
    return {name: len(set(checksums)) for name, checksums in cut.items() if checksums}
