"""Captions beside pictures: in folders, and in the .tar shards of web datasets."""

import json
import tarfile
from pathlib import Path

from diff_instruct.prompts.text_files import open_text


PICTURES = set(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .avif .jxl".split())


def has_picture(file):
    """Whether a picture of the same name lies beside a file."""
    return any(file.with_suffix(form).exists() for suffix in PICTURES for form in (suffix, suffix.upper()))


def visible(folder):
    """The files in a folder and in those below, sorted; what begins with a dot is left out."""
    found = (f for f in Path(folder).rglob("*") if not any(part[0] == "." for part in f.relative_to(folder).parts))
    return sorted(f for f in found if not f.is_dir())


def read_captions(pattern, source, columns=None):
    """The texts of `folder/*.caption` or `folder/*.txt`, or of one file, whole; the places are the files' names."""
    folder, suffix = Path(pattern).parent, Path(pattern).suffix
    for file in visible(folder) if Path(pattern).stem == "*" else [Path(pattern)]:
        if file.suffix.lower() == suffix:
            if suffix == ".txt" and not has_picture(file):
                yield str(file.relative_to(folder)), "a .txt beside no picture"
                continue
            with open_text(file) as f:
                yield str(file.relative_to(folder)), {"text": f.read()}


def read_tar(file, source, columns=None):
    """A row for each sample of a web dataset: files whose names are the same up to the first dot.

    Its text is the .txt or .caption, as the column `txt` or `caption`; or a column of the .json, if there is no text
    or if it is named.
    """
    for number, sample in enumerate(texts_of_tar(file).values(), 1):
        yield number, sample_row(sample, source)


def texts_of_tar(file):
    """{name of a sample: {"txt", "caption", "json": bytes, as far as there are such}}."""
    samples = {}
    with tarfile.open(file) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key, _, kind = name.partition(".")
            if member.isfile() and key:
                sample = samples.setdefault(f"{folder}/{key}", {})
                if kind.lower() in ("txt", "caption", "json"):
                    sample[kind.lower()] = archive.extractfile(member).read()
    return samples


def sample_row(sample, source):
    """The row of a sample, {"txt", "caption", "json": bytes}, or why it has none."""
    if not sample:
        return "a sample without text"
    row = {}
    if "json" in sample:
        try:
            found = json.loads(sample["json"].decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError):
            return "not JSON"
        row = found if isinstance(found, dict) else {"json": found}
    texts = {k: sample[k].decode("utf-8-sig", "surrogateescape") for k in ("txt", "caption") if k in sample}
    if not texts or source.caption_column in row.keys() - texts.keys() and not source.if_several:
        return row
    kept = {k: v for k, v in row.items() if k == source.category_column}
    return {**texts, **kept}
