"""What holds wherever a reward is asked: what it raises becomes one line, and all processes end together."""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.numbers import NoScores
from diff_instruct.training.checkpoints import fails_anywhere


def is_out_of_memory(error):
    """Whether an exception says that memory, the accelerator's or the computer's, is used up."""
    words = ("can't allocate memory", "not enough memory")  # of torch's allocator on the CPU
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def first_line(error):
    """What kind of exception it is, and the first line of what it says."""
    kind, said = type(error).__name__, str(error).strip()
    return f"{kind}: {said.splitlines()[0]}" if said else kind


@contextmanager
def asking(what, file=None):
    """Within: a reward is asked. Whatever it raises, `sys.exit()` too, becomes a [`NoScores`], but for memory that is
    used up.

    Args:
        what: who failed, in words.
        file: the user's own, of which the line that failed is named.
    """
    try:
        yield
    except NoScores:
        raise
    except Mistake as error:
        raise NoScores(str(error)) from error
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        seen = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" (line {seen[-1]} of {Path(file).name})" if seen else ""
        raise NoScores(f"{what} failed: {first_line(error)}{where}") from error


@contextmanager
def on_all(accelerator):
    """Within: each process asks a reward. If one gets no scores, all raise [`NoScores`] at the end.

    Args:
        accelerator: None for one process.
    """
    why = None
    try:
        yield
    except NoScores as error:
        why = error
    if accelerator is not None and accelerator.num_processes > 1 and fails_anywhere(accelerator, why):
        raise why or NoScores("another process got no scores")
    if why is not None:
        raise why


def ask(reward, pixels, prompts):
    """Ask a reward without waiting for it if it is elsewhere: a function that gives `reward(pixels, prompts)`."""
    if hasattr(reward, "ask"):
        return reward.ask(pixels, prompts)
    r = reward(pixels, prompts)
    return lambda: r
