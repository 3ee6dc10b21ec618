"""Rows of local prompt files, one at a time; a row that cannot be read is named, and the others still are."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


LONGEST_CELL = 1 << 24  # characters; csv's own limit is 131,072


def open_text(file, **options):
    """Opens UTF-8, with or without a BOM; bytes that are not UTF-8 become lone surrogates, which `problem` finds."""
    return open(file, encoding="utf-8-sig", errors="surrogateescape", **options)


def read_txt(file, columns=None):
    """A prompt a line."""
    with open_text(file) as f:
        for number, line in enumerate(f, 1):
            yield number, {"text": line.rstrip("\n")}


def read_csv(file, columns=None, **dialect):
    """The rows below the header; numbers are those of the lines on which they end."""
    csv.field_size_limit(LONGEST_CELL)
    with open_text(file, newline="") as f:
        reader = csv.reader(f, **dialect)
        header = next(reader, [])
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, f"not CSV, {error}"
                continue
            too_many = len(cells) > len(header)
            yield reader.line_num, "more cells than columns" if too_many else dict(zip(header, cells))


def read_tsv(file, columns=None):
    """As CSV, but a quotation mark is part of the text."""
    return read_csv(file, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_json(file, columns=None):
    """JSON Lines, or one list; of objects, or of strings."""
    with open_text(file) as f:
        start = f.read(1)
        while start.isspace():
            start = f.read(1)
        f.seek(0)
        if start == "[":
            try:
                items = json.load(f)
            except (ValueError, RecursionError):
                f.seek(0)
            else:
                yield from ((number, as_row(item)) for number, item in enumerate(items, 1))
                return
        for number, line in enumerate(f, 1):
            try:
                yield number, as_row(json.loads(line)) if line.strip() else {}
            except (ValueError, RecursionError):
                yield number, "not JSON"


def as_row(item):
    """An object as it is, a string as the only column of a row, or the name of what cannot be a row."""
    if isinstance(item, dict):
        return item
    return {"text": item} if isinstance(item, str) else f"not text but {type(item).__name__}"


def read_parquet(file, columns=None):
    """All columns, or those named."""
    number = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=100, columns=columns):
        cells = []
        for column in batch.columns:
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                raw = column.cast(pa.large_binary()).to_pylist()  # as text one bad row would spoil the batch
                cells.append([v if v is None else v.decode("utf-8", "surrogateescape") for v in raw])
            else:
                cells.append(column.to_pylist())
        for row in zip(*cells):
            number += 1
            yield number, dict(zip(batch.schema.names, row))


READERS = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}


def read_rows(files, columns=None):
    """(file, number, row) of every row of some files: a dictionary, or a string that says why it cannot be read."""
    for file in files:
        for number, row in READERS[Path(file).suffix.lower()](file, columns):
            yield file, number, row
