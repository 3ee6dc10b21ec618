"""What `--reward` and its kin say, and the mistakes that show before anything loads. Imports no networks."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.catalogue import CATALOGUE
from diff_instruct.rewards.urls import check_url, is_url


NO_REWARD = "none"  # what `--reward` says of a run without reward


@dataclass(frozen=True)
class RewardSpec:
    """A reward as the command line says it; it exists, and so does its checkpoint if it names one.

    Args:
        name: one of the `CATALOGUE`, a user's own as `path/to/file.py:function`, or the URL of a judge elsewhere.
        weight: its factor in the mix, in the published unit of its score.
        cap: the score, in that unit, above which it is not pursued any further; None: everywhere.
        checkpoint: local file or folder instead of the Hub's.
        timeout, retries: of a judge elsewhere, see [`RemoteReward`].
        standardized: whether it counts in units of its spread over the generator's own pictures.

    Raises:
        Mistake: for a reward that is not known, a file that is not there, a weight or cap that is no finite number.
    """

    name: str
    weight: float = 1.0
    cap: float | None = None
    checkpoint: str | None = None
    timeout: float = 60.0
    retries: int = 5
    standardized: bool = False

    def __post_init__(self):
        wrong = check_url(self.name) if is_url(self.name) else None
        if wrong is not None:
            raise Mistake(f"reward `{without_secrets(self.name)}`: {wrong}")
        if self.file is not None and not Path(self.file).is_file():
            raise Mistake(f"reward `{self.name}`: no such file: {self.file}")
        if self.file is not None and not self.label.isidentifier():
            raise Mistake(f"reward `{self.name}`: after {self.file}: comes the name of a function")
        if self.file is None and self.published is None and not is_url(self.name):
            known = (
                f"known are {', '.join(CATALOGUE)}, or your own as path/to/file.py:function or http://host:port/path"
            )
            raise Mistake(f"unknown reward `{self.name}`; {known}")
        if self.checkpoint is not None and not Path(self.checkpoint).exists():
            raise Mistake(f"--reward_checkpoint {self.name}={self.checkpoint}: no such file or folder")

    @property
    def file(self):
        """The Python file of a user's own reward, else None."""
        file, is_file, _ = self.name.rpartition(".py:")
        return f"{file}.py" if is_file and not is_url(self.name) else None

    @property
    def has_gradient(self):
        """Whether it can have a gradient; of a user's own it is tried."""
        return not is_url(self.name) and (self.published is None or self.published.has_gradient)

    @property
    def published(self):
        """What the `CATALOGUE` has of it; None for a user's own."""
        return CATALOGUE.get(self.name)

    @property
    def label(self):
        """What logs call it: its name, the function's, or the last part of a URL's path."""
        return label_of(self.name)


def read_rewards(args):
    """(trained, held out), a tuple of [`RewardSpec`] each, of the training script's `--reward`, `--reward_cap`,
    `--reward_standardize`, `--heldout_reward` and `--reward_checkpoint`. With `--reward none` nothing is trained on.

    Raises:
        Mistake: see `RewardSpec`; or for one name twice, caps of what is not trained, entries that cannot be read, a
            measurement among what is trained.
    """
    checkpoints = read_checkpoints(args.reward_checkpoint)
    weights = [split_number("reward", entry) for entry in args.reward if args.reward != [NO_REWARD]]
    labels = [label_of(name) for name, _ in weights]
    caps = {}
    for label, value in split_pairs("reward_cap", args.reward_cap).items():
        if label not in labels:
            raise Mistake(f"--reward_cap: `{label}` is not in --reward{called(labels)}")
        caps[label] = finite(value)
        if caps[label] is None:
            raise Mistake(f"--reward_cap {label}={value}: the cap must be a finite number")
    standardized = args.reward_standardize or []
    for label in standardized:
        if label not in labels:
            raise Mistake(f"--reward_standardize: `{label}` is not in --reward{called(labels)}")
    asking = args.reward_timeout, args.reward_retries
    trained = tuple(
        RewardSpec(
            name,
            1.0 if weight is None else weight,
            caps.get(label),
            checkpoints.get(name),
            *asking,
            label in standardized,
        )
        for (name, weight), label in zip(weights, labels)
    )
    measured = [spec.name for spec in trained if not spec.has_gradient]
    if measured and args.reward_mode != "surrogate":
        raise Mistake(
            f"--reward {measured[0]}: it only judges, without gradient; give it as --heldout_reward, or train on its "
            "numbers with --reward_mode surrogate"
        )
    heldout = tuple(RewardSpec(name, 1.0, None, checkpoints.get(name), *asking) for name in args.heldout_reward or [])
    check_labels([*trained, *heldout])
    return trained, heldout


def called(labels):
    """What rewards can be called where a name is none of them; nothing if there are none."""
    return f"; write {' or '.join(dict.fromkeys(labels))}" if labels else ""


def files_of(specs, reward_checkpoint):
    """The user's own files that rewards are made of, as pairs (what the command line calls it, path).

    Args:
        specs: [`RewardSpec`] each.
        reward_checkpoint: the entries of `--reward_checkpoint`, or None.
    """
    own = [("the reward's file", spec.file) for spec in specs if spec.file]
    return own + [(f"--reward_checkpoint {name}", path) for name, path in read_checkpoints(reward_checkpoint).items()]


def read_scorers(rewards, reward_checkpoint=(), **asking):
    """A tuple of [`RewardSpec`], of names and `--reward_checkpoint`; `asking` may hold `timeout` and `retries`. Raises
    as `read_rewards`."""
    checkpoints = read_checkpoints(reward_checkpoint)
    scorers = tuple(RewardSpec(name, 1.0, None, checkpoints.get(name), **asking) for name in rewards)
    check_labels(scorers)
    return scorers


def check_labels(specs):
    """Raises Mistake for two rewards that logs would call the same."""
    labels = [spec.label for spec in specs]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise Mistake(f"reward `{twice[0]}` is given twice; all that are trained, held out or reported must differ")


def read_checkpoints(entries):
    """`dict` of reward to path, of `--reward_checkpoint`; those of rewards that are not used are checked, too.

    Raises:
        Mistake: for an unknown reward, or a path that is not there.
    """
    checkpoints = split_pairs("reward_checkpoint", entries)
    for name, path in checkpoints.items():
        if name not in CATALOGUE:
            raise Mistake(f"--reward_checkpoint: unknown reward `{name}`; known are {', '.join(CATALOGUE)}")
        RewardSpec(name, checkpoint=path)
    return checkpoints


def split_number(flag, entry):
    """(name, number) of `name[:number]`, `path/to/file.py:function[:number]` or `http://host:port/path[:number]`; None
    for a number that is not given.

    Raises:
        Mistake: for a number that is none, or not finite.
    """
    if is_url(entry):
        file, is_file, rest = entry.rpartition("/")
    else:
        file, is_file, rest = entry.rpartition(".py:")
    name, has_number, number = rest.partition(":")
    if has_number and finite(number) is None:
        raise Mistake(f"--{flag} {entry}: after the colon comes a finite number, as in {name or 'image_reward'}:0.5")
    return file + is_file + name, finite(number) if has_number else None


def label_of(name):
    """What logs call a reward."""
    return name.rpartition("/" if is_url(name) else ":")[2]


def without_secrets(url):
    """Scheme and what follows the last @, without a query."""
    return re.sub(r"(?<=://).*@", "", re.split("[?#]", url)[0])


def split_pairs(flag, entries):
    """`dict` of `name=value` entries.

    Raises:
        Mistake: for an entry without an equals sign, or a name that is given twice.
    """
    pairs = {}
    for entry in entries or []:
        name, has_value, value = entry.partition("=")
        if not (name and has_value and value):
            raise Mistake(f"--{flag} {entry}: write name=value")
        if name in pairs:
            raise Mistake(f"--{flag}: `{name}` is given twice")
        pairs[name] = value
    return pairs


def finite(word):
    """The finite number that a word says, else None."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
