"""Which rows are prompts, and which prompts are the same."""

import re
from collections import Counter


LONGEST = 10_000  # characters; text encoders read some hundred tokens
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)


def problem(row):
    """Why a row of `open_prompts` cannot be used, in a few words; None if it can."""
    text = row["text"]
    if row.get("problem"):
        return row["problem"]
    if text is None:
        return "null"
    if not isinstance(text, str):
        return f"not text but {type(text).__name__}"
    if not tidy(text):
        return "blank"
    if len(text) > LONGEST:
        return f"longer than {LONGEST:,} characters"
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: undecodable bytes, or half of a pair in JSON
        return "not UTF-8"
    return None


def tidy(text):
    """The prompt without what surrounds it: white space, a byte order mark."""
    return text.strip().strip("\ufeff").strip()


def same(text):
    """Equal for prompts that differ in case or white space alone."""
    return " ".join(text.split()).casefold()


def is_number(value):
    """Whether it is a number, or a cell of a .csv or .tsv file that spells one."""
    return isinstance(value, (int, float)) or (isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None)


class Skipped:
    """Rows that cannot be used: how many of each kind, and the first ones by name.

    Attributes:
        counts: `Counter` of the problems.
        first: the first few rows, in words.
    """

    def __init__(self, shown=5):
        self.shown = shown
        self.clear()

    def clear(self):
        self.counts, self.first = Counter(), []

    def add(self, row, why):
        self.counts[why] += 1
        if len(self.first) < self.shown:
            value = row["text"] if isinstance(row["text"], str) else repr(row["text"])
            self.first.append(f"{row.get('place') or ascii(value[:40])} ({why})")

    def __str__(self):
        kinds = ", ".join(f"{n:,} {why}" for why, n in self.counts.most_common())
        return f"{kinds}; the first: {', '.join(self.first)}"
