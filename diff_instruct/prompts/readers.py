"""Rows of local prompt files, one at a time; a row that cannot be read is named, and the others still are.

A reader takes (file, [`PromptSource`], names of columns or None for all) and yields (number, row): a dictionary, or a
string that says why there is none.
"""

import lzma
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diff_instruct.prompts.documents import read_json
from diff_instruct.prompts.samples import read_captions, read_tar
from diff_instruct.prompts.tables import read_table
from diff_instruct.prompts.text_files import compression_of, read_txt


BROKEN = (pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, tarfile.TarError)


def read_parquet(file, source, columns=None):
    """All columns, or those named."""
    parquet = pq.ParquetFile(file)
    return read_batches(parquet.iter_batches(batch_size=100, columns=columns))


def read_arrow(file, source, columns=None):
    """As parquet: what `datasets` saves to disk, or a feather file."""
    with pa.memory_map(str(file)) as mapped:
        try:
            batches = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from read_batches(batches, columns)


def read_batches(batches, columns=None):
    """The rows of record batches, numbered from 1."""
    number = 0
    for batch in batches:
        if columns is not None:
            batch = batch.select([name for name in columns if name in batch.schema.names])
        cells = []
        for column in batch.columns:
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                raw = column.cast(pa.large_binary()).to_pylist()  # as text one bad row would spoil the batch
                cells.append([v if v is None else v.decode("utf-8", "surrogateescape") for v in raw])
            else:
                cells.append(column.to_pylist())
        for row in zip(*cells) if cells else [()] * batch.num_rows:
            number += 1
            yield number, dict(zip(batch.schema.names, row))


READERS = {
    ".txt": read_txt,
    ".csv": read_table,
    ".tsv": read_table,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".tar": read_tar,
    ".caption": read_captions,
}


def format_of(file):
    """The key of `READERS` that a file's name says, or its suffix; `folder/*.txt` are captions beside pictures."""
    if Path(file).stem == "*":
        return ".caption"
    suffix = compression_of(file)[1]
    return ".tar" if suffix == ".tgz" else suffix


def read_rows(files, source, columns=None):
    """(file, number, row) of every row of some files: a dictionary, or a string that says why there is none."""
    for file in files:
        for number, row in READERS[format_of(file)](Path(file), source, columns):
            yield file, number, row
