"""Seconds and peak memory of a piece of work."""

import sys
import time

import torch


MEMORY_IS = {
    "cuda": "peak memory that PyTorch allocated on the GPU while drawing, the model with it but not the rewards",
    "cpu": "peak resident memory of the process until then, with all that it had loaded",
}


def peak_gib(device):
    """Peak memory so far: what PyTorch allocated on the GPU, or the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Measures what runs in `with meter:` as `seconds` and `gib`, see `MEMORY_IS`; make it before the model loads."""

    def __init__(self, device):
        self.device = device
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = time.perf_counter()

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.gib = (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**30
        else:
            self.gib = peak_gib(self.device)
        self.seconds = time.perf_counter() - self.started
