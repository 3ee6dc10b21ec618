"""Which rows are prompts, and which prompts are the same."""

import re
import unicodedata
from collections import Counter


BLANK_LINES, COMMENTS, OPTIONS = "blank lines", "comments", "options of a trainer"
ONE = {BLANK_LINES: "blank line", COMMENTS: "comment", OPTIONS: "option of a trainer"}
NO_ROWS = {BLANK_LINES, COMMENTS, OPTIONS}  # are told, but nobody meant them as prompts
MOST_FAULTS = 0.01  # of the rows, that may be left out without being asked
LONGEST = 10_000  # characters; text encoders read some hundred tokens
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)


def problem(row):
    """Why a row of `open_prompts` cannot be used, in a few words; None if it can: if one of its captions can."""
    text = row["text"]
    if row.get("problem"):
        return row["problem"]
    if isinstance(text, list) and text and all(caption is None or isinstance(caption, str) for caption in text):
        problems = [text_problem(caption) for caption in text]
        return None if None in problems else problems[0]
    return text_problem(text)


def text_problem(text):
    """Why a text is no prompt, in a few words; None if it is one."""
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


def captions(row):
    """The prompts of a row that can be used, tidied: one, or several of which one is to be drawn."""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    return [tidy(text) for text in texts if text_problem(text) is None]


def same(text):
    """Equal for prompts that differ in case, white space or Unicode form alone."""
    if text.isascii():  # most are, and it takes a fifth of the time
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def some(names, most=10):
    """Names for a message, the first few of them."""
    names = [str(name) if len(str(name)) <= 60 else str(name)[:59] + "…" for name in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_number(value):
    """Whether it is a number, or a cell of a .csv or .tsv file that spells one."""
    return isinstance(value, (int, float)) or (isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None)


def told(n, why):
    """How many, and of what, in words."""
    return f"{n:,} {ONE.get(why, why) if n == 1 else why}"


class Skipped:
    """Rows that cannot be used: how many of each kind, and the first ones by name.

    Attributes:
        counts: `Counter` of the problems.
        first: the first few rows, in words.
        places: the first row of each kind.
    """

    def __init__(self, shown=5):
        self.shown = shown
        self.clear()

    def clear(self):
        self.counts, self.first, self.places = Counter(), [], {}

    def add(self, row, why):
        self.counts[why] += 1
        if len(self.first) < self.shown or why not in self.places:
            value = row["text"] if isinstance(row["text"], str) else repr(row["text"])
            place = row.get("place") or ascii(value[:40])
            self.places.setdefault(why, place)
            if len(self.first) < self.shown:
                self.first.append(f"{place} ({why})")

    @property
    def faults(self):
        """How many rows there are of which somebody meant that they are prompts."""
        return sum(n for why, n in self.counts.items() if why not in NO_ROWS)

    def kinds(self, of_faults):
        """The faults, or the others, in words: each with how many there are and where the first one is."""
        chosen = [(why, n) for why, n in self.counts.most_common() if (why not in NO_ROWS) == of_faults]
        return ", ".join(f"{told(n, why)} (first {self.places[why]})" for why, n in chosen)

    def __str__(self):
        kinds = ", ".join(told(n, why) for why, n in self.counts.most_common())
        return f"{kinds}; the first: {', '.join(self.first)}"
