"""Where prompts come from: the Hub or local files, streamed through `datasets`."""

import csv
from pathlib import Path

from datasets import load_dataset

from diff_instruct.mistake import Mistake


FORMATS = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HELDOUT_EVERY = 20


def find_files(path):
    """The prompt files that a path means (itself, or those in a folder), all of one format.

    Raises:
        Mistake: if there are none, or several formats.
    """
    path = Path(path)
    if not path.exists():
        raise Mistake(f"prompts: no such file or folder: {path}")
    files = sorted(f for f in path.iterdir() if f.suffix in FORMATS) if path.is_dir() else [path]
    kinds = sorted({f.suffix for f in files})
    if len(kinds) != 1 or kinds[0] not in FORMATS:
        found = ", ".join(kinds) or "nothing"
        raise Mistake(f"prompts: {path} must hold files of one of {', '.join(FORMATS)}, but holds {found}")
    return [str(f) for f in files]


def open_prompts(source, name=None, split="train", column=None, local=False, cache_dir=None, category=None):
    """A streamed dataset with one column, `text`, or two, `text` and `category`.

    Args:
        source (`str`): a Hub id, or with `local` a file or folder.
        column (`str`, *optional*): the column with the prompts; may be left out if there is only one.
        category (`str`, *optional*): the column with the prompts' categories.

    Raises:
        Mistake: if there are no rows, no such column, or several and none is named.
    """
    if local:
        files = find_files(source)
        kind = FORMATS[Path(files[0]).suffix]
        options = {"keep_default_na": False} if kind == "csv" else {}  # "null" may be a prompt
        if files[0].endswith(".tsv"):
            options.update(sep="\t", quoting=csv.QUOTE_NONE)  # a quotation mark in a .tsv is part of the text
        if all(Path(f).stat().st_size == 0 for f in files):
            raise Mistake(f"{source} is empty: it must hold at least one prompt")
        dataset = load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=cache_dir, **options)
    else:
        dataset = load_dataset(source, name, split=split, streaming=True, cache_dir=cache_dir)
    first = next(iter(dataset), None)
    if first is None:
        raise Mistake(f"{source} is empty: it must hold at least one prompt")
    if column is None and len(first) == 1:
        column = next(iter(first))
    if column not in first:
        raise Mistake(f"{source} has no column `{column}`; set --caption_column to one of: {', '.join(first)}")
    if category is not None and category not in first:
        raise Mistake(f"{source} has no column `{category}`; set --category_column to one of: {', '.join(first)}")
    names = {column: "text"} if category is None else {column: "text", category: "category"}
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def split_heldout(dataset, n_heldout):
    """(training prompts, held-out prompts): every 20th row, `n_heldout` of them at most, is never trained on."""

    def is_heldout(i):
        return i % HELDOUT_EVERY == 0 and i < n_heldout * HELDOUT_EVERY

    train = dataset.filter(lambda _, i: not is_heldout(i), with_indices=True)
    return train, dataset.filter(lambda _, i: is_heldout(i), with_indices=True)


def load_prompts(args):
    """(streamed training prompts, list of held-out prompts to judge with), as the arguments say.

    Raises:
        Mistake: see `open_prompts`.
    """
    options = {"column": args.caption_column, "cache_dir": args.cache_dir}
    if args.train_prompts is not None:
        dataset = open_prompts(args.train_prompts, local=True, **options)
    else:
        options.update(name=args.dataset_config_name, split=args.dataset_split)
        dataset = open_prompts(args.dataset_name, **options)
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    if args.eval_prompts is not None:
        heldout = open_prompts(args.eval_prompts, local=True)
    else:
        dataset, heldout = split_heldout(dataset, args.num_eval_prompts)
    return dataset, [row["text"] for row in heldout.take(args.num_eval_prompts)]
