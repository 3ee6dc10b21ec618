"""Ends a run between two steps: on SIGINT (Ctrl-C), on SIGTERM, or when the prompts cannot be read any further."""

import os
import signal

import torch

from diff_instruct.prompts.stream import StreamBroken
from diff_instruct.training.endings import GO_ON_LATER, Ending


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of one process accelerate's launcher passes no signal on: a SIGTERM ends it alone, and this is how that is noticed.
LAUNCHER = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None


class Interrupts:
    """Reasons to end after the step that is being taken, the same for all processes.

    A signal sets a flag that the loop asks for after each step; further ones change nothing (a launcher passes on what
    the terminal has sent to all), so what ends at once is SIGQUIT (Ctrl-\\) or SIGKILL. If the launcher is gone, that
    counts as a SIGTERM.
    """

    def __init__(self, accelerator):
        self.accelerator, self.seen, self.broken = accelerator, set(), None

    def listen(self, steps):
        """Yield the steps; meanwhile signals are noted instead of ending the process at once."""
        before = {number: signal.signal(number, lambda n, _: self.seen.add(n)) for number in SIGNALS}
        try:
            yield from steps
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def read_ahead(self, sampler, draws):
        """Read what the next step draws, so that a broken stream shows between steps."""
        try:
            sampler.read_ahead(draws)
        except StreamBroken as error:
            self.broken = error

    def agreed(self):
        """The [`Ending`] that any process has a reason for, on all of them after the same step; else None."""
        if LAUNCHER not in (None, os.getppid()):
            self.seen.add(signal.SIGTERM)
        mine = [*(number in self.seen for number in SIGNALS), self.broken is not None]
        if self.accelerator.num_processes > 1:
            mine = self.accelerator.reduce(torch.tensor(mine, dtype=torch.int32, device=self.accelerator.device))
            mine = mine.tolist()
        for number, is_seen in zip(SIGNALS, mine):
            if is_seen:
                return Ending(128 + number, signal.Signals(number).name)
        if mine[-1]:
            return Ending(GO_ON_LATER, str(self.broken or "the prompts cannot be read by another process"))
        return None
