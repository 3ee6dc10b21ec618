"""What `--reward` and its kin say, and the mistakes that show before anything loads."""

import math

from diff_instruct.mistake import Mistake


def parse_reward(entry):
    """(spec, weight) of `name[:weight]` or `path/to/file.py:function[:weight]`.

    Raises:
        Mistake: for a weight that is no number.
    """
    file, is_file, rest = entry.partition(".py:")
    name, has_weight, weight = (rest if is_file else entry).partition(":")
    spec = f"{file}.py:{name}" if is_file else name
    try:
        weight = float(weight) if has_weight else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise Mistake(f"--reward {entry}: after the colon comes a number, as in image_reward:0.5")
    return spec, weight


def short_name(spec):
    """What logs call a reward: its name, or the function's."""
    return spec.rpartition(":")[2]


def parse_pairs(flag, entries):
    """`dict` of `name=value` entries.

    Raises:
        Mistake: for an entry without an equals sign.
    """
    for entry in entries or []:
        if "=" not in entry:
            raise Mistake(f"--{flag} {entry}: write name=value")
    return dict(entry.split("=", 1) for entry in entries or [])
