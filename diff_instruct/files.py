"""Writing, whole or absent; and never where an input lies."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diff_instruct.mistake import Mistake


PARTIAL, NEW = "partial-export", "new-export"  # folders inside the one that is written to: not yet whole; whole
INDEX = "model_index.json"  # without it a folder is no pipeline
READ_BY_NAME = (".safetensors", ".bin", ".json")  # files of an older export that a newer one's would be mixed with


class NotWritten(OSError):
    """A file could not be written: `str` says in a few words why."""


@contextmanager
def writing():
    """Within: what safetensors, torch and Python raise if a file cannot be written becomes [`NotWritten`]."""
    try:
        yield
    except SafetensorError as error:
        raise NotWritten(str(error)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise NotWritten("the disk is full, or another error of writing in torch.save") from error
    except NotWritten:
        raise
    except OSError as error:
        why = error.strerror or str(error).split("\n")[0]
        raise NotWritten("no space left on the disk" if error.errno == errno.ENOSPC else why) from error


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(file):
    """Within: the path to write to, beside `file`, which it replaces at the end; until then `file` is as it was.

    So a kill leaves the old file or the new one, and who has mapped the old one into memory keeps it.

    Raises:
        NotWritten: if it cannot be written; what was written of it is removed.
    """
    file = Path(file)
    aside = file.with_name(f"{file.name}.partial")
    with writing():
        try:
            yield aside
            flush(aside)
            os.replace(aside, file)
        except Exception:
            aside.unlink(missing_ok=True)
            raise


def write_text(file, text):
    """Write a text file, [`whole`]."""
    with whole(file) as aside:
        aside.write_text(text)


@contextmanager
def whole_folder(folder, optional=()):
    """Within: an empty folder to write an export to, whose files take their places in `folder` at the end.

    It is `partial-export` inside `folder`; when all is on the disk it is renamed to `new-export`, and only then the
    older export is touched: its `model_index.json` goes first and the new one comes last. So a kill at any moment
    leaves the old export or the new one, whole and loadable, in `folder` or in `folder/new-export`; and nothing that
    is half the one and half the other can be loaded. Whoever writes there next ends what a kill left undone.

    Args:
        optional: files of an export that this one may lack; they do not stay from an older one.

    Raises:
        NotWritten: if something cannot be written. While it is being written the older export stays as it was.
    """
    folder = Path(folder)
    partial, new = folder / PARTIAL, folder / NEW
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
        if new.exists():
            put_in_place(new, folder, optional)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                flush(path)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.replace(partial, new)
        flush(folder)
        put_in_place(new, folder, optional)


def put_in_place(new, folder, optional=()):
    """Let each file of `new` take its place in `folder`; `new` stays whole until all have, and is then removed."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    files.sort(key=lambda file: file.name == INDEX)
    for file in files:
        if file.name == INDEX:
            (folder / file).unlink(missing_ok=True)
    for name in set(optional) - {str(file) for file in files}:
        (folder / name).unlink(missing_ok=True)
    for part in {file.parent for file in files} - {Path(".")}:
        if (folder / part).is_symlink():  # what it leads to is not ours
            (folder / part).unlink()
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).iterdir():
            if old.suffix in READ_BY_NAME and old.is_file() and part / old.name not in files:
                old.unlink()
    for file in files:
        aside = (folder / file).with_name(f"{file.name}.partial")
        aside.unlink(missing_ok=True)
        try:
            os.link(new / file, aside)
        except OSError:  # not on every file system
            shutil.copyfile(new / file, aside)
            flush(aside)
        os.replace(aside, folder / file)
    for part in {file.parent for file in files}:
        flush(folder / part)
    os.replace(new, new.with_name(PARTIAL))  # no longer whole as soon as something is removed
    shutil.rmtree(new.with_name(PARTIAL))


def check_apart(outputs, inputs, may_hold=()):
    """No output is an input, holds one or lies in one, whatever links lead there.

    Args:
        outputs, inputs: pairs (what the user calls it, such as "--output_dir", path); None is passed over, and
            inputs that are not there, as Hub ids are not.
        may_hold: the same, of what may lie in an output, as nothing else is written under its names: caches. Those
            that are not there yet count: once they are, the same command would be refused.

    Raises:
        Mistake: in one line that names both.
    """
    given = [(what, path) for what, path in inputs if path is not None and Path(path).exists()]
    others = [(*pair, ("is", "lies in", "holds")) for pair in given]
    others += [(*pair, ("is", "lies in")) for pair in may_hold if pair[1] is not None]
    for what, output in outputs:
        for other, path, forbidden in others if output is not None else ():
            how = what != other and relation(output, path)
            if how in forbidden:
                raise Mistake(f"{what} {output} {how} {other} {path}, which must stay as it is: take another folder")


def relation(a, b):
    """How a path is to another: "is", "lies in" or "holds" it, or None."""
    pairs = [(x, y) for x in places(a) for y in places(b)]
    within, around = ({pair for pair in pairs if lies_in(*pair[::step])} for step in (1, -1))
    return "is" if within & around else "lies in" if within else "holds" if around else None


def places(path):
    """Where a file or folder is, links followed; and what links in it, two levels deep, lead to."""
    path = Path(path)
    links = [p for level in ("*", "*/*") for p in path.glob(level) if p.is_symlink()] if path.is_dir() else []
    return {p.resolve() for p in (path, *links)}


def lies_in(a, b):
    """Whether a resolved path is another one, or below it; on file systems that know no case, too."""
    return any(p == b or (p.exists() and b.exists() and p.samefile(b)) for p in (a, *a.parents))
