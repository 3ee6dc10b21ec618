"""Text files, plain or compressed: opened as what they are, and read line by line."""

import bz2
import gzip
import lzma
import re
from pathlib import Path

from diff_instruct.prompts.rows import BLANK_LINES, COMMENTS, OPTIONS, tidy


COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMMENT = re.compile(r"#(?!\d|[0-9a-fA-F]{6}\b)")  # "#1 of a kind" and "#ff8800 sky" are prompts
OPTION = re.compile(r"\s--[a-z]+(?=\s|$)")


def compression_of(file):
    """(what opens a file, its format): (gzip.open, ".csv") of prompts.csv.gz."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return COMPRESSIONS[suffixes[-1]], suffixes[-2] if len(suffixes) > 1 else ""
    return open, suffixes[-1] if suffixes else ""


def open_text(file, **options):
    """Opens UTF-8, with or without a BOM, or UTF-16 with one (as spreadsheets write); what cannot be decoded becomes
    lone surrogates, which `problem` finds."""
    opener, _ = compression_of(file)
    with opener(file, "rb") as f:
        encoding = "utf-16" if f.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    return opener(file, "rt", encoding=encoding, errors=errors, **options)


def read_txt(file, source=None, columns=None):
    """A prompt a line, as trainers have it, too: without comments (`# ...`) and options (`--w 512 --n blurry`)."""
    with open_text(file) as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\n")
            if not tidy(line):
                yield number, BLANK_LINES
            elif COMMENT.match(tidy(line)):
                yield number, COMMENTS
            else:
                prompt, *options = OPTION.split(line, maxsplit=1)
                yield number, {"text": prompt}
                if options:
                    yield number, OPTIONS
