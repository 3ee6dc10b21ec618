"""What became of the rows: read, used, held out, left out and why; told before training, and kept with the figures."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datasets import IterableDataset
from tqdm.auto import tqdm

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.cut import Cut
from diff_instruct.prompts.files import (
    PromptSource,
    category_of,
    first_line,
    nothing_usable,
    open_files,
    open_prompts,
    rows_of_files,
    usable,
)
from diff_instruct.prompts.readers import BROKEN, READERS, format_of
from diff_instruct.prompts.rows import MOST_FAULTS, NO_ROWS, Skipped, captions, problem, same, some
from diff_instruct.prompts.stream import ENOUGH


HELDOUT_EVERY = 20


@dataclass
class Count:
    """Rows of a [`PromptSource`], as far as it was read.

    Attributes:
        source: its name.
        used: rows with a prompt, those that are judged included.
        judged: of these, the rows that are not trained on, since they are judged.
        skipped ([`Skipped`]): the others.
        files: {file: [rows, used]}, of local ones.
        whole: whether all was read; a data set on the Hub is counted as it comes.
        cut ([`Cut`], *optional*): counts the prompts that the generator reads in part only.
    """

    source: str
    used: int = 0
    judged: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    files: dict = field(default_factory=dict)
    whole: bool = True
    cut: Cut | None = None

    @property
    def rows(self):
        """How many were meant as prompts."""
        return self.used + self.skipped.faults

    def add(self, row, why, file=None, judged=False):
        """Count a row of `open_prompts`, with its `problem`."""
        if why is None:
            self.used += 1
            self.judged += judged
            for caption in captions(row) if self.cut is not None else ():
                self.cut.add(caption, row.get("place"))
        else:
            self.skipped.add(row, why)
        if file is not None:
            seen = self.files.setdefault(file, [0, 0])
            seen[0] += why not in NO_ROWS
            seen[1] += why is None

    def fault(self):
        """Why the prompts are not to be used without being asked, in a few words; None if they are."""
        lost = [Path(file).name for file, (rows, used) in self.files.items() if rows and not used]
        if lost:
            return f"nothing of {some(lost, 3)} can be used"
        if self.skipped.faults > MOST_FAULTS * self.rows:
            return f"{self.skipped.faults:,} of {self.rows:,} rows cannot be used"
        return None

    def check(self, allow_bad_rows):
        """Raises Mistake if more than 1% of the rows, or a whole file, is left out and that is not allowed."""
        why = self.fault()
        if why is not None and not allow_bad_rows:
            raise Mistake(f"{self.source}: {why}: {self.skipped.kinds(True)}; --allow_bad_rows leaves them out")

    def __str__(self):
        faults, others = self.skipped.kinds(True), self.skipped.kinds(False)
        line = f"{self.source}: {self.rows:,} rows read{'' if self.whole else ' so far'}, {self.used:,} used"
        line += f", {self.judged:,} of them to judge with and not to train on" if self.judged else ""
        line += f", {self.skipped.faults:,} left out" + (f": {faults}" if faults else "")
        return line + (f"; no prompts: {others}" if others else "")

    def as_dict(self):
        """For `training_summary.json`."""
        return {
            "rows": self.rows,
            "used": self.used,
            "judged": self.judged,
            "left_out": dict(self.skipped.counts),
            "first_left_out": dict(self.skipped.places),
            "all_read": self.whole,
            "cut": None if self.cut is None else self.cut.as_dict(),
        }


class Prompts(NamedTuple):
    """What a run reads."""

    train: IterableDataset  # streamed
    judged: list  # prompts to judge with, which are not in `train`
    count: Count  # of the training rows


def is_judged(row, judged):
    """Whether one of the captions of a row is among the judged ones, a set of `same`."""
    return len(judged) > 0 and problem(row) is None and any(same(text) in judged for text in captions(row))


def all_rows(source):
    """(file or None, row) of every row of a source.

    Raises:
        Mistake: if a file is broken; see also `open_prompts`.
    """
    if source.path is None:
        yield from ((None, row) for row in open_prompts(source))
        return
    rows = islice(rows_of_files(*open_files(source), source), source.max_samples)
    try:
        yield from tqdm(rows, desc=f"reading {source}", unit=" rows", delay=3, leave=False)
    except BROKEN as error:
        raise Mistake(f"{source} cannot be read: {first_line(error)}") from None


def count_rows(source, judged=(), cut=None):
    """The [`Count`] of a source that ends. Raises as `all_rows`."""
    count = Count(str(source), cut=cut)
    for file, row in all_rows(source):
        count.add(row, problem(row), file, is_judged(row, judged))
    return count


def read_all(source):
    """([(prompt, category or None)], [`Count`]) of a source that ends; of several captions in a row the first.

    Raises:
        Mistake: as `all_rows`; if there is no prompt, or too many rows cannot be used.
    """
    count, found = Count(str(source)), []
    for file, row in all_rows(source):
        why = problem(row)
        count.add(row, why, file)
        if why is None:
            found.append((captions(row)[0], category_of(row)))
    if not found:
        raise nothing_usable(source, count.skipped)
    count.check(source.allow_bad_rows)
    return found, count


def count_head(source, rows, judged, cut=None):
    """The [`Count`] of the first rows of a streamed data set."""
    count = Count(str(source), whole=len(rows) < ENOUGH, cut=cut)
    for row in rows:
        count.add(row, problem(row), judged=is_judged(row, judged))
    return count


def heldout_prompts(rows, source, number):
    """Every 20th prompt, different ones, `number` of them at most."""
    heldout = {}
    for i, (text, _) in enumerate(islice(usable(rows, source), HELDOUT_EVERY * number)):
        if i % HELDOUT_EVERY == 0:
            heldout.setdefault(same(text), text)
    return list(heldout.values())


def recorded(rows, seen):
    """The rows, each of which is noted in a list when it is read."""
    for row in rows:
        seen.append(row)
        yield row


def load_prompts(train, judge, num_eval_prompts, tell=print, cut=None):
    """The [`Prompts`] of the [`PromptSource`]s of `prompt_sources`; one line says what was read, and another what the
    generator cuts of it ([`Cut`]).

    What is judged is every 20th training prompt, or (`judge`) the first prompts of another source. It is never trained
    on: it is taken out by its text, so also where a prompt occurs twice, in another file or in other writing (`same`).
    Local files are read once from end to end before, of a data set on the Hub the first rows.

    Raises:
        Mistake: see `open_prompts`; if no prompt can be used, none is left to train on, or too many rows are left out.
    """
    dataset, seen, told = open_prompts(train), [], []
    rows = recorded(dataset, seen)
    if judge is None:
        prompts = heldout_prompts(rows, train, num_eval_prompts)
    else:
        found, counted = read_all(judge)
        prompts, told = [text for text, _ in found[:num_eval_prompts]], [f"to judge with: {counted}"]
    judged = {same(text) for text in prompts}
    if train.path is None:
        list(islice(rows, ENOUGH - min(ENOUGH, len(seen))))
        count = count_head(train, seen, judged, cut)
    else:
        count = count_rows(train, judged, cut)
    if not count.used:
        raise nothing_usable(train, count.skipped)
    if count.whole and count.judged == count.used:
        raise Mistake(
            f"{train}: every prompt is held out to judge with ({len(prompts)}), none is left to train on: give more, "
            "or others with --eval_prompts"
        )
    count.check(train.allow_bad_rows)
    tell("; ".join([f"Prompts: {count}", *told]))
    if cut is not None and str(cut):
        tell(str(cut))
    return Prompts(dataset.filter(lambda row: not is_judged(row, judged)), prompts, count)


def prompts_to_draw(args, eval_prompts):
    """Those of `--validation_prompts`, or the first in the file that it names; else the first that are judged.

    Raises:
        Mistake: as `read_all`; for a file beside other words.
    """
    named, number = args.validation_prompts, args.num_validation_prompts
    if named is None:
        return eval_prompts[:number]
    files = [w for w in named if format_of(w) in READERS and (" " not in w or Path(w).is_file())]
    if not files:
        return named
    if len(named) > 1:
        raise Mistake(f"--validation_prompts: give prompts or one file of them, not {files[0]} among others")
    own = args.eval_caption_column
    found, _ = read_all(
        PromptSource(
            files[0],
            caption_column=own or args.caption_column,
            if_several=own is None,
            option="--eval_caption_column",
            allow_bad_rows=args.allow_bad_rows,
        )
    )
    return [text for text, _ in found[:number]]


def in_words(read):
    """What `rows_read` has, as a model card says it."""
    words = f"{read['rows']:,} rows read{'' if read['all_read'] else ' of a stream'}, {read['used']:,} used"
    if read.get("judged"):
        words += f", {read['judged']:,} of these to judge with and not to train on"
    left_out = ", ".join(f"{n:,} {why}" for why, n in read["left_out"].items() if why not in NO_ROWS)
    words += f"; left out: {left_out}" if left_out else ""
    cut = read["cut"]
    if cut and cut["cut"]:
        words += f"; {cut['cut']:,} of {cut['counted']:,} are longer than the {cut['tokens']} tokens that are read"
    return words


def rows_read(count, stream):
    """What `training_summary.json` says of the training rows, after they were drawn from a [`PromptStream`]."""
    if count.whole:
        return count.as_dict()
    read = Count(count.source, stream.used, skipped=stream.skipped, whole=stream.counted, cut=count.cut).as_dict()
    return {k: v for k, v in read.items() if k != "judged"}  # which were taken out before they came
