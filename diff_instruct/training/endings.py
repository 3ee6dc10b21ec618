"""How a run ends that does not finish: one line on stderr and an exit code for each reason (docs/robustness.md)."""

import copy
import sys
from contextlib import contextmanager

import torch

from diff_instruct.export.card import EVAL_RESULTS, LORA_WEIGHTS
from diff_instruct.files import NotWritten, whole_folder
from diff_instruct.mistake import Mistake
from diff_instruct.models.memory_plan import GIB, plan
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.stream import StreamBroken


MISTAKE, NOT_FINITE, OUT_OF_MEMORY, NOT_WRITTEN, GO_ON_LATER = 1, 3, 4, 5, 75  # exit codes; a signal's is 128 + number


class Ending(RuntimeError):
    """A reason to end, in one line, that is neither a mistake on the command line nor a bug.

    Args:
        code (`int`): of the exit.
        line (`str`): what happened and how to go on.
    """

    def __init__(self, code, line):
        super().__init__(line)
        self.code = code

    def after(self, checkpoint, step):
        """Itself, with how to go on: from the checkpoint that was written after `step` steps, or an earlier one."""
        how = f"{checkpoint} is written" if checkpoint else "no checkpoint could be written"
        return type(self)(self.code, f"{self} after step {step}; {how}: go on with --resume_from_checkpoint latest")


@contextmanager
def writing_export(args):
    """Within: the folder to export to, whose files take their places in `--output_dir` at the end, see
    [`whole_folder`]. The run is done, and what is lost by an error of writing is only the export.

    Raises:
        Ending: with how to export again.
    """
    try:
        with whole_folder(args.output_dir, optional=(LORA_WEIGHTS, EVAL_RESULTS)) as folder:
            yield folder
    except NotWritten as error:
        how = "with --resume_from_checkpoint latest and the same arguments, which trains no further"
        line = f"the export in {args.output_dir} could not be written: {error}; make room, and export again {how}"
        raise Ending(NOT_WRITTEN, line) from error


def is_out_of_memory(error):
    """Whether an exception says that memory, the accelerator's or the computer's, is used up."""
    words = ("can't allocate memory", "not enough memory")  # of torch's allocator on the CPU
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def memory_advice(args):
    """One line: the largest actor of the plan, and the three flags, among those not yet used, that would help most.

    Two are those that the plan says save most; the third is the first of those that make activations smaller.
    """
    models = models_of(args)

    def size(**changes):
        changed = copy.copy(args)
        vars(changed).update(changes)
        return {k: sum(v.values()) for k, v in plan(changed, models, changed.mixed_precision or "no").items()}

    actors = size()
    changes = {
        "--ta_lora_rank 64": {} if args.ta_lora_rank else {"ta_lora_rank": 64},
        "--lora_rank 64": {} if args.lora_rank else {"lora_rank": 64},
        "--mixed_precision bf16": {} if args.mixed_precision == "bf16" else {"mixed_precision": "bf16"},
        "--use_8bit_adam": {} if args.use_8bit_adam else {"use_8bit_adam": True},
        "--no-use_ema": {} if not args.use_ema else {"use_ema": False},
    }
    saved = {flag: sum(actors.values()) - sum(size(**change).values()) for flag, change in changes.items() if change}
    best = [flag for flag in sorted(saved, key=saved.get, reverse=True) if saved[flag] > 0][:2]
    half = f"--train_batch_size {args.train_batch_size // 2} --gradient_accumulation_steps "
    activations = {
        "--gradient_checkpointing": not args.gradient_checkpointing,
        "--reward_batch_size 1": args.reward_batch_size != 1,
        half + str(2 * args.gradient_accumulation_steps): args.train_batch_size > 1,
    }
    best += [flag for flag, unused in activations.items() if unused][: 3 - len(best)]
    largest = max(actors, key=actors.get)
    return (
        f"the largest actor is the {largest} ({actors[largest] / GIB:.2f} of {sum(actors.values()) / GIB:.2f} GiB, "
        f"without activations); what would help most: {', '.join(best)}"
    )


def run_to_the_end(parse_args, main):
    """Parse and run; returns the exit code. A bug keeps its traceback."""
    args = None
    try:
        args = parse_args()
        main(args)
        return 0
    except Mistake as error:
        code, line = MISTAKE, f"error: {error}"
    except Ending as error:
        code, line = error.code, f"stopped: {error}"
    except StreamBroken as error:
        code, line = GO_ON_LATER, f"stopped: {error}; go on later with --resume_from_checkpoint latest"
    except NotWritten as error:
        code, line = NOT_WRITTEN, f"stopped: a file in {args.output_dir} could not be written: {error}"
    except (RuntimeError, MemoryError) as error:
        if args is None or not is_out_of_memory(error):
            raise
        code, line = OUT_OF_MEMORY, f"stopped: out of memory: {memory_advice(args)}"
    print(line.replace("\n", " "), file=sys.stderr, flush=True)
    return code
