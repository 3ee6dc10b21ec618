"""Where prompts come from: the Hub or local files, streamed through `datasets`."""

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import IterableDataset, load_dataset

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.readers import BROKEN, READERS, format_of, read_rows
from diff_instruct.prompts.rows import NO_ROWS, Skipped, captions, is_number, problem, some
from diff_instruct.prompts.samples import PICTURES, has_picture, visible
from diff_instruct.prompts.tables import is_known


HEAD = 100  # rows that tell the columns, and whether one holds text


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from; either `path` or `dataset_name`.

    Args:
        path (`str`): a file or a folder of files of one format, see `READERS`, also in folders below.
        dataset_name (`str`): a Hub id, with its configuration `dataset_config_name` and `split`.
        caption_column (`str`, *optional*): the column with the prompts; may be left out if there is only one.
        if_several (`bool`): `caption_column` is meant only if there are several columns.
        category_column (`str`, *optional*): the column with the prompts' categories.
        max_samples (`int`, *optional*): only the first so many rows.
        cache_dir (`str`, *optional*): where downloads are kept.
        caption_choice (`str`): of several captions in a row one is drawn each time ("random"), or it is the "first".
        allow_bad_rows (`bool`): more than 1% of the rows, or a whole file, may be left out.
        option (`str`): the argument that names the column, for messages.
    """

    path: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    caption_column: str | None = None
    if_several: bool = False
    category_column: str | None = None
    max_samples: int | None = None
    cache_dir: str | None = None
    caption_choice: str = "random"
    allow_bad_rows: bool = False
    option: str = "--caption_column"

    def __str__(self):
        return self.dataset_name if self.path is None else str(self.path)

    @property
    def finite(self):
        """Whether it is known to end within reach: local files, or so many rows of a data set."""
        return self.path is not None or self.max_samples is not None


def prompt_sources(args):
    """(the [`PromptSource`] to train on, that to judge with or None), as the training script's arguments say."""
    options = {"cache_dir": args.cache_dir, "allow_bad_rows": args.allow_bad_rows}
    column = {"caption_column": args.caption_column, "caption_choice": args.caption_choice}
    if args.train_prompts is not None:
        train = PromptSource(args.train_prompts, max_samples=args.max_train_samples, **column, **options)
    else:
        named = args.dataset_name, args.dataset_config_name, args.dataset_split
        train = PromptSource(None, *named, max_samples=args.max_train_samples, **column, **options)
    if args.eval_prompts is None:
        return train, None
    own, options["option"] = args.eval_caption_column, "--eval_caption_column"
    return train, PromptSource(
        args.eval_prompts, caption_column=own or args.caption_column, if_several=own is None, **options
    )


def find_files(path):
    """The prompt files that a path means (itself, or those in a folder and below), all of one format; empty ones are
    left out. Captions beside pictures are one: `folder/*.txt` or `folder/*.caption`.

    Raises:
        Mistake: if there are none, several formats, or one that may not be read.
    """
    path = Path(path)
    if not path.exists():
        raise Mistake(f"prompts: no such file or folder: {path}")
    files = [path]
    if path.is_dir():
        found = visible(path)
        files = [f for f in found if format_of(f) in READERS]
        if any(format_of(f) == ".arrow" for f in files):
            files = without_what_datasets_adds(files)
        pictures = any(f.suffix.lower() in PICTURES for f in found)
        beside = {f.suffix.lower() for f in files if f.suffix.lower() == ".caption"}
        beside |= {".txt" for f in files if pictures and f.suffix.lower() == ".txt" and has_picture(f)}
        files = [f for f in files if f.suffix.lower() not in beside] + [path / f"*{kind}" for kind in sorted(beside)]
    kinds = sorted({f.suffix if f.stem == "*" else format_of(f) for f in files})
    if len(kinds) != 1 or format_of(files[0]) not in READERS:
        found = some([kind or "a name without ending" for kind in kinds]) or "nothing"
        raise Mistake(f"prompts: {path} must hold files of one of {', '.join(READERS)}, but holds {found}")
    if files[0].stem == "*":
        return [str(files[0])]
    for file in files:
        if not file.is_file() or not os.access(file, os.R_OK):
            raise Mistake(f"prompts: {file} cannot be read: it is no file, or its permissions forbid it")
    files = [str(f) for f in files if f.stat().st_size > 0]
    if not files:
        raise Mistake(f"{path} is empty: it must hold at least one prompt")
    return files


def without_what_datasets_adds(files):
    """The files of the rows that `datasets` has saved in a folder, without what it saves beside them and, when they
    are mapped, caches.

    Raises:
        Mistake: for the splits of a data set.
    """
    folders = [f.parent for f in files if f.name == "state.json"]
    if any(f.name == "dataset_dict.json" for f in files):
        splits = some([folder.name for folder in folders])
        raise Mistake(f"prompts: {folders[0].parent} holds the splits {splits}: give the folder of one of them")
    beside = [f for f in files if f.parent in folders and (f.suffix == ".json" or f.name.startswith("cache-"))]
    return [f for f in files if f not in beside]


def choose_columns(source, columns):
    """{column of the source: "text" or "category"}.

    Raises:
        Mistake: if there is no such column, or there are several and none is named.
    """
    text, category = source.caption_column, source.category_column
    others = [column for column in columns if column != category]
    if len(others) == 1 and (text is None or source.if_several):
        text = others[0]
    if text is None:
        raise Mistake(f"{source} has several columns; set {source.option} to one of: {some(columns)}")
    if text not in columns:
        raise Mistake(f"{source} has no column `{text}`; set {source.option} to one of: {some(columns)}")
    if category is not None and category not in columns:
        raise Mistake(f"{source} has no column `{category}`; set --category_column to one of: {some(columns)}")
    return {text: "text"} if category is None else {text: "text", category: "category"}


def generate_rows(files, names, source):
    """The rows of local files as `open_prompts` has them."""
    return (row for _, row in rows_of_files(files, names, source))


def rows_of_files(files, names, source):
    """(file, row) of every row of local files, as `open_prompts` has them."""
    text, places = next(iter(names)), {file: place_of(file, source) for file in files}
    for file, number, row in read_rows(files, source, list(names)):
        cells = {new: row.get(old) if isinstance(row, dict) else None for old, new in names.items()}
        why = row if isinstance(row, str) else "" if text in row else f"without `{text}`"
        place = f"{places[file]}:{number}" if places[file] else number
        yield file, choose_caption({**cells, "place": place, "problem": why}, source)


def place_of(file, source):
    """A file's name, from its folder on if it is in one below that of the source; none of captions beside pictures,
    whose numbers are names."""
    if Path(file).stem == "*":
        return ""
    return str(Path(file).relative_to(source.path)) if Path(source.path).is_dir() else Path(file).name


def choose_caption(row, source):
    """The row, of several captions with the first one alone if that is to be taken."""
    if source.caption_choice == "first" and isinstance(row["text"], list):
        return {**row, "text": (captions(row) or [row["text"]])[0]}
    return row


def open_files(source):
    """(files, columns as `choose_columns` has them) of local files.

    Raises:
        Mistake: as `open_prompts`.
    """
    files = find_files(source.path)
    try:
        head = [row for _, _, row in islice(read_rows(files, source), HEAD)]
    except BROKEN as error:
        raise Mistake(f"{source} cannot be read: {first_line(error)}") from None
    if not head:
        raise Mistake(f"{source} is empty: it must hold at least one prompt")
    columns = list(dict.fromkeys(str(key) for row in head if isinstance(row, dict) for key in row))
    if not columns and NO_ROWS.issuperset(map(str, head)):  # of a .txt: there may be prompts below
        columns = ["text"]
    if not columns:
        raise Mistake(f"{source} has no rows that can be read; the first one: {head[0]}")
    names = choose_columns(source, columns)
    text = next(iter(names))
    values = [row[text] for row in head if isinstance(row, dict) and row.get(text) not in (None, "")]
    if len(columns) > 1 and not is_known(text) and values and all(is_number(value) for value in values):
        others = some(column for column in columns if column != text)
        raise Mistake(f"{source}: column `{text}` holds numbers; set {source.option} to one of: {others}")
    return files, names


def first_line(error):
    """Of a library's error, or its class."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def open_hub(source):
    """`open_prompts` of a data set on the Hub."""
    try:
        dataset = load_dataset(
            source.dataset_name,
            source.dataset_config_name,
            split=source.split,
            streaming=True,
            cache_dir=source.cache_dir,
        )
        columns = dataset.column_names or list(next(iter(dataset), ()))
    except Exception as error:  # of a network, of the Hub, of a loader: they have no class in common
        raise Mistake(
            f"the prompts {source} cannot be downloaded ({first_line(error)}); give a file instead"
        ) from error
    if not columns:
        raise Mistake(f"{source} is empty: it must hold at least one prompt")
    names = choose_columns(source, columns)
    dataset = dataset.select_columns(list(names))
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    return dataset.map(choose_caption, fn_kwargs={"source": source}) if source.caption_choice == "first" else dataset


def open_prompts(source):
    """A streamed dataset of the rows of a [`PromptSource`], as they come: `problem` tells which can be used.

    Columns: `text`, a string or a list of several captions; with `category_column`, `category`; of local files also
    `place`, the file's name and the number of the row, and `problem`, why it cannot be read, or "".

    Raises:
        Mistake: if it cannot be opened, there are no rows, no such column, or several and none is named.
    """
    if source.path is None:
        dataset = open_hub(source)
    else:
        files, names = open_files(source)
        rows = {"files": files, "names": names, "source": source}
        dataset = IterableDataset.from_generator(generate_rows, gen_kwargs=rows)
    return dataset if source.max_samples is None else dataset.take(source.max_samples)


def usable(dataset, source, skipped=None):
    """Yields the prompts of `open_prompts`, tidied, with their categories (or None); of several captions the first.

    Args:
        skipped ([`Skipped`], *optional*): counts the other rows.

    Raises:
        Mistake: at the end, if there was none; after some rows without any text.
    """
    skipped, found = Skipped() if skipped is None else skipped, False
    for i, row in enumerate(dataset):
        why = problem(row)
        if why is None:
            found = True
            yield captions(row)[0], category_of(row)
        else:
            skipped.add(row, why)
        if i == HEAD and not found and all(kind.startswith("not text but") for kind in skipped.counts):
            break
    if not found:
        raise nothing_usable(source, skipped)


def category_of(row):
    """The category of a row of `open_prompts`; None if the cell is empty, or no column is named."""
    category = row.get("category")
    return None if isinstance(category, str) and not category.strip() else category


def nothing_usable(source, skipped):
    """The [`Mistake`] that no row can be used."""
    hint = ""
    if any(kind.startswith("not text but") for kind in skipped.counts):
        column = source.caption_column
        hint = f"; {source.option} names {'the' if column is None else 'another'} column with the prompts"
    return Mistake(f"{source} has no prompts that can be used: {skipped if skipped.counts else 'no rows'}{hint}")
