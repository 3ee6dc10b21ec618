"""Tables in text files, .csv and .tsv: which delimiter and quotation, and whether the first row is a header."""

import ast
import csv
import json
import re
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.rows import BLANK_LINES, is_number
from diff_instruct.prompts.text_files import compression_of, open_text


LONGEST_CELL = 1 << 24  # characters; csv's own limit is 131,072
SPECIAL = set('"\r\n')  # cells with these, or with the delimiter, are written in quotation marks
KNOWN = set("caption captions prompt prompts text texts txt sentence sentences description descriptions".split())
NOT_TEXT = set("id ids idx index length len num number count".split())  # of the words that such a name ends with
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # each format's own first
FORMS = {
    "quoted": {"strict": True},  # RFC 4180: quotation marks around a cell, doubled within it
    "spaced": {"strict": True, "skipinitialspace": True},  # a space between the delimiter and the quotation mark
    "escaped": {"strict": True},  # Spark, R: quotation marks within a cell as \"
    "raw": {"quoting": csv.QUOTE_NONE},  # a quotation mark is part of the text
}


class Dialect(NamedTuple):
    """How a table is written."""

    delimiter: str
    form: str
    header: bool

    def reader(self, lines):
        """Of the `csv` module."""
        csv.field_size_limit(LONGEST_CELL)
        if self.form == "escaped":
            lines = (line.replace('\\"', '""') for line in lines)
        return csv.reader(lines, delimiter=self.delimiter, **FORMS[self.form])


def is_known(name):
    """Whether a column's name says that it holds prompts: caption, text_prompt, TEXT, longCaption."""
    if not isinstance(name, str) or len(name.split()) != 1:
        return False
    words = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name.strip()).lower())
    return not KNOWN.isdisjoint(words) and NOT_TEXT.isdisjoint(words)


class Taken:
    """Lines as they are, and those that were taken since the last record."""

    def __init__(self, lines):
        self.lines, self.taken = lines, []

    def __iter__(self):
        for line in self.lines:
            self.taken.append(line)
            yield line

    def record(self):
        """The text of the record, without its end of line."""
        text, self.taken = "".join(self.taken).rstrip("\r\n"), []
        return text


def measure(file, dialect):
    """(records that are not so written, a `Counter` of numbers of cells, whether quotation marks look like text).

    They do if a column has cells in quotation marks that need none, and other words without: no program writes so.
    """
    errors, widths, needless, plain = 0, Counter(), set(), set()
    with open_text(file, newline="") as f:
        lines = Taken(f)
        reader = dialect.reader(iter(lines))
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error:
                errors += 1
                continue
            finally:
                text = lines.record()
            if not cells:
                continue
            widths[len(cells)] += 1
            parts = text.split(dialect.delimiter)
            if len(parts) == len(cells) and sum(widths.values()) > 1:  # below the header
                for i, (part, cell) in enumerate(zip(parts, cells)):
                    if cell and part == f'"{cell}"' and SPECIAL.isdisjoint(cell):
                        needless.add(i)
                    elif cell and part == cell and not is_number(cell):
                        plain.add(i)
    return errors, widths, bool(needless & plain)


def first_row(file, delimiter):
    """Its cells, without what surrounds them."""
    with open_text(file, newline="") as f:
        return [cell.strip() for cell in next((row for row in csv.reader(f, delimiter=delimiter) if row), [])]


def dialect_of(file, source):
    """The [`Dialect`] of a file.

    Its delimiter is the one that makes the first row a header, with a column that is named or known; its quotation is
    the first of `FORMS` that every record follows.

    Raises:
        Mistake: if the first row may be a header or a prompt.
    """
    stat = file.stat()
    named = tuple(name for name in (source.caption_column, source.category_column) if name is not None)
    dialect, row = choose(file, named, (stat.st_size, stat.st_mtime_ns))
    name = source.caption_column
    if not dialect.header and not (name is not None and name.isdecimal() and 0 < int(name) <= len(row)):
        start = f"has no column `{name}`, and " if name is not None else ""
        shown = " | ".join(row)
        shown = shown if len(shown) <= 80 else shown[:79] + "…"
        raise Mistake(
            f"{file} {start}begins with the row `{shown}`: if these are names of columns, set {source.option} to one "
            f"of them; if it is a prompt already, to the number of its column, 1 to {len(row)}"
        )
    return dialect


@lru_cache(maxsize=10_000)
def choose(file, named, version):
    """(the [`Dialect`], the first row) of a file; `version` tells whether it has changed."""
    own = DELIMITERS[compression_of(file)[1]]
    rows = {delimiter: first_row(file, delimiter) for delimiter in own}
    headed = [d for d, row in rows.items() if any(cell in named or is_known(cell) for cell in row)]
    column = None
    for delimiter, form in product(headed or own, FORMS):
        dialect, width = Dialect(delimiter, form, bool(headed)), len(rows[delimiter])
        errors, widths, mixed = measure(file, dialect)
        if errors or mixed and own[0] == "\t":
            continue
        if headed and form == "quoted":  # rows may have fewer cells
            fits = max(widths, default=0) <= width
        else:
            fits = set(widths) == {width}
        if fits and (headed or width > 1):
            return dialect, rows[delimiter]
        if fits and column is None:
            column = dialect  # without a header one column is what no delimiter divides
    dialect = column or Dialect((headed or own)[0], "raw" if own[0] == "\t" else "quoted", bool(headed))
    return dialect, rows[dialect.delimiter]


def as_captions(cell):
    """The strings of a cell that spells a list of them, as JSON or Python does; another cell as it is."""
    if cell[:2] in ('["', "['") and cell[-2:] in ('"]', "']"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(cell)
                exact = read is json.loads or repr(found) == cell  # numpy's ['a' 'b'] would read as ['ab']
                if exact and all(isinstance(caption, str) for caption in found):
                    return found
    return cell


def read_table(file, source, columns=None):
    """The rows of a .csv or .tsv file; numbers are those of the lines on which they end.

    Columns without a header are called by their numbers, from 1.
    """
    dialect = dialect_of(file, source)
    with open_text(file, newline="") as f:
        reader, header = dialect.reader(f), None
        while True:
            line = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # each of the lines that it has swallowed may have been a row
                yield from ((number, f"not CSV, {error}") for number in range(line + 1, reader.line_num + 1))
                continue
            if header is None and cells:
                if dialect.header:
                    header = [cell.strip() for cell in cells]
                    continue
                header = [str(i) for i in range(1, len(cells) + 1)]
            if not cells:
                yield reader.line_num, BLANK_LINES
            elif len(cells) > len(header):
                yield reader.line_num, "more cells than columns"
            else:
                yield reader.line_num, dict(zip(header, map(as_captions, cells)))
