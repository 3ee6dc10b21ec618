"""How a run ends that does not finish: one line on stderr and an exit code for each reason (docs/robustness.md)."""

import signal
import sys
from contextlib import contextmanager

from diff_instruct.export.card import EVAL_RESULTS, LORA_WEIGHTS
from diff_instruct.files import NotWritten, whole_folder
from diff_instruct.mistake import Mistake
from diff_instruct.plan.advice import what_would_help
from diff_instruct.prompts.stream import StreamBroken
from diff_instruct.rewards.asking import is_out_of_memory


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
    except KeyboardInterrupt:  # before the first step, as while prompts are encoded or pairs drawn, or after the last
        code, how = 128 + signal.SIGINT, "go on with the same command and --resume_from_checkpoint latest"
        line = f"stopped: SIGINT; what is written stays: {how}"
    except (RuntimeError, MemoryError) as error:
        if args is None or not is_out_of_memory(error):
            raise
        code, line = OUT_OF_MEMORY, f"stopped: out of memory: {what_would_help(args)}"
    print(line.replace("\n", " "), file=sys.stderr, flush=True)
    return code
