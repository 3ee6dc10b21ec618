"""Where prompts come from: the Hub or local files, streamed through `datasets`."""

import logging
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import IterableDataset, load_dataset

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.readers import READERS, read_rows
from diff_instruct.prompts.rows import Skipped, is_number, problem, same, tidy


logger = logging.getLogger(__name__)

HELDOUT_EVERY = 20
HEAD = 100  # rows that tell the columns, and whether one holds text


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from; either `path` or `dataset_name`.

    Args:
        path (`str`): a file or a folder of files of one format, see `READERS`.
        dataset_name (`str`): a Hub id, with its configuration `dataset_config_name` and `split`.
        caption_column (`str`, *optional*): the column with the prompts; may be left out if there is only one.
        if_several (`bool`): `caption_column` is meant only if there are several columns.
        category_column (`str`, *optional*): the column with the prompts' categories.
        max_samples (`int`, *optional*): only the first so many rows.
        cache_dir (`str`, *optional*): where downloads are kept.
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

    def __str__(self):
        return self.dataset_name if self.path is None else str(self.path)

    @property
    def finite(self):
        """Whether it is known to end within reach: local files, or so many rows of a data set."""
        return self.path is not None or self.max_samples is not None


def prompt_sources(args):
    """(the [`PromptSource`] to train on, that to judge with or None), as the training script's arguments say."""
    options = {"caption_column": args.caption_column, "cache_dir": args.cache_dir}
    if args.train_prompts is not None:
        train = PromptSource(args.train_prompts, max_samples=args.max_train_samples, **options)
    else:
        named = args.dataset_name, args.dataset_config_name, args.dataset_split
        train = PromptSource(None, *named, max_samples=args.max_train_samples, **options)
    return train, args.eval_prompts and PromptSource(args.eval_prompts, if_several=True, **options)


def find_files(path):
    """The prompt files that a path means (itself, or those in a folder), all of one format; empty ones are left out.

    Raises:
        Mistake: if there are none, several formats, or one that may not be read.
    """
    path = Path(path)
    if not path.exists():
        raise Mistake(f"prompts: no such file or folder: {path}")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in READERS) if path.is_dir() else [path]
    kinds = sorted({f.suffix.lower() for f in files})
    if len(kinds) != 1 or kinds[0] not in READERS:
        found = ", ".join(kinds) or "nothing"
        raise Mistake(f"prompts: {path} must hold files of one of {', '.join(READERS)}, but holds {found}")
    for file in files:
        if not file.is_file() or not os.access(file, os.R_OK):
            raise Mistake(f"prompts: {file} cannot be read: it is no file, or its permissions forbid it")
    files = [str(f) for f in files if f.stat().st_size > 0]
    if not files:
        raise Mistake(f"{path} is empty: it must hold at least one prompt")
    return files


def choose_columns(source, columns):
    """{column of the source: "text" or "category"}.

    Raises:
        Mistake: if there is no such column, or there are several and none is named.
    """
    text, category = source.caption_column, source.category_column
    if len(columns) == 1 and (text is None or source.if_several):
        text = columns[0]
    if text not in columns:
        raise Mistake(f"{source} has no column `{text}`; set --caption_column to one of: {', '.join(columns)}")
    if category is not None and category not in columns:
        raise Mistake(f"{source} has no column `{category}`; set --category_column to one of: {', '.join(columns)}")
    return {text: "text"} if category is None else {text: "text", category: "category"}


def generate_rows(files, names):
    """The rows of local files as `open_prompts` has them."""
    for file, number, row in read_rows(files, list(names)):
        cells = {new: row.get(old) if isinstance(row, dict) else None for old, new in names.items()}
        why = row if isinstance(row, str) else "" if row else "blank"
        yield {**cells, "place": f"{Path(file).name}:{number}", "problem": why}


def open_files(source):
    """`open_prompts` of local files."""
    files = find_files(source.path)
    try:
        head = [row for _, _, row in islice(read_rows(files), HEAD)]
    except (pa.ArrowException, OSError) as error:
        raise Mistake(f"{source} cannot be read: {str(error).splitlines()[0]}") from None
    if not head:
        raise Mistake(f"{source} is empty: it must hold at least one prompt")
    columns = list(dict.fromkeys(str(key) for row in head if isinstance(row, dict) for key in row))
    if not columns:
        why = next(row or "blank" for row in head)
        raise Mistake(f"{source} has no rows that can be read; the first one: {why}")
    names = choose_columns(source, columns)
    dataset = IterableDataset.from_generator(generate_rows, gen_kwargs={"files": files, "names": names})
    text = next(iter(names))
    values = [row[text] for row in head if isinstance(row, dict) and row.get(text) not in (None, "")]
    if len(columns) > 1 and values and all(is_number(value) for value in values):
        raise Mistake(f"{source}: column `{text}` holds numbers; set --caption_column to one of: {', '.join(columns)}")
    return dataset


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
        line = (str(error).splitlines() or [""])[0]
        raise Mistake(
            f"the prompts {source} cannot be downloaded ({line or type(error).__name__}); give a file instead"
        ) from error
    if not columns:
        raise Mistake(f"{source} is empty: it must hold at least one prompt")
    names = choose_columns(source, columns)
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def open_prompts(source):
    """A streamed dataset of the rows of a [`PromptSource`], as they come: `problem` tells which can be used.

    Columns: `text`; with `category_column`, `category`; of local files also `place`, the file's name and the number of
    the row, and `problem`, why it cannot be read, or "".

    Raises:
        Mistake: if it cannot be opened, there are no rows, no such column, or several and none is named.
    """
    dataset = open_hub(source) if source.path is None else open_files(source)
    return dataset if source.max_samples is None else dataset.take(source.max_samples)


def usable(dataset, source, skipped=None):
    """Yields the prompts of `open_prompts`, tidied, with their categories (or None).

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
            yield tidy(row["text"]), row.get("category")
        else:
            skipped.add(row, why)
        if i == HEAD and not found and all(kind.startswith("not text but") for kind in skipped.counts):
            break
    if not found:
        seen = str(skipped) if skipped.counts else "no rows"
        hint = "; --caption_column names the column with the prompts" if "not text" in seen else ""
        raise Mistake(f"{source} has no prompts that can be used: {seen}{hint}")


def split_heldout(dataset, source, number):
    """(held-out prompts, the dataset without them): every 20th prompt, different ones, `number` of them at most.

    They are taken out by their text, so that a prompt that occurs twice, or in another file, is not trained on.
    """
    heldout = {}
    for i, (text, _) in enumerate(islice(usable(dataset, source), HELDOUT_EVERY * number)):
        if i % HELDOUT_EVERY == 0:
            heldout.setdefault(same(text), text)
    train = dataset.filter(lambda row: problem(row) is not None or same(tidy(row["text"])) not in heldout)
    return list(heldout.values()), train


def load_prompts(train, judge, num_eval_prompts):
    """(streamed training prompts, list of prompts to judge with), of the [`PromptSource`]s of `prompt_sources`.

    Prompts that are held out of `train` (if `judge` is None) are never trained on. Those that are named are the user's
    choice: they stay in the training prompts if they are there, with a warning where that is seen early.

    Raises:
        Mistake: see `open_prompts`; if no prompt can be used, or none is left to train on.
    """
    dataset = open_prompts(train)
    if judge is None:
        prompts, dataset = split_heldout(dataset, train, num_eval_prompts)
        if not any(problem(row) is None for row in dataset):
            raise Mistake(
                f"{train}: every prompt is held out to judge with ({len(prompts)}), none is left to train on: give "
                "more, or others with --eval_prompts"
            )
        return dataset, prompts
    prompts = [text for text, _ in islice(usable(open_prompts(judge), judge), num_eval_prompts)]
    first = {same(text) for text, _ in islice(usable(dataset, train), HELDOUT_EVERY * num_eval_prompts)}
    both = sum(same(text) in first for text in prompts)
    if both:
        logger.warning(f"{both} of the {len(prompts)} prompts to judge with are trained on, too: figures flatter")
    return dataset, prompts
