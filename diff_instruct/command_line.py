"""What both scripts' command lines share: a parser whose mistakes are one line, and types that carry their range."""

import argparse
import difflib
import math
import re

from diff_instruct.mistake import Mistake


class Parser(argparse.ArgumentParser):
    """argparse's parser: every default is in the help, no flag is abbreviated, and its own exits are a [`Mistake`].

    Subclasses of `argparse.ArgumentParser` print the usage and leave with code 2; here one line names the argument.
    """

    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        """As argparse's. Raises Mistake for what cannot be read."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]  # not the value: it may be a token
            if not word.startswith("-"):
                raise Mistake("a word on the command line belongs to no argument: quote values that hold spaces")
            flags = list(self._option_string_actions)
            similar = [f for f in flags if f.startswith(word)] or difflib.get_close_matches(word, flags)
            hint = f"did you mean {' or '.join(similar)}?" if similar else "see --help"
            raise Mistake(f"unknown argument {word}: {hint}")
        return known

    def error(self, message):
        raise Mistake(" ".join(re.sub(r"^argument ([^:]+):(?= must)", r"\1", message).split()))


def text(value):
    """A string that is not empty, as an unset shell variable would be."""
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def whole(least, most=None):
    """The type of whole numbers from `least` on, or `least` to `most`."""
    words = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def convert(value):
        if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value) or int(value) < least or (most and int(value) > most):
            raise argparse.ArgumentTypeError(f"must be {words}, but is {value!r}")
        return int(value)

    return convert


def image_size(value):
    """The type of an image's size in pixels: of its side, as a whole number, or WIDTHxHEIGHT, as it is typed."""
    if re.fullmatch(r"[1-9]\d{0,4}", value):
        return int(value)
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value):
        raise argparse.ArgumentTypeError(f"must be pixels, as in 1024, or WIDTHxHEIGHT, as in 832x1216, not {value!r}")
    return value


def real(words, fits=lambda x: True):
    """The type of finite numbers for which `fits` is true; `words` say which, after "must be"."""

    def convert(value):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and fits(number)):
            raise argparse.ArgumentTypeError(f"must be {words}, but is {value!r}")
        return number

    return convert


natural, positive_int = whole(0), whole(1)
seed = whole(0, 2**32 - 1)  # NumPy takes no other
positive = real("a positive number", lambda x: x > 0)
non_negative = real("a number of at least 0", lambda x: x >= 0)
fraction = real("a number from 0 to 1", lambda x: 0 <= x <= 1)
decay = real("a number from 0 to below 1", lambda x: 0 <= x < 1)
