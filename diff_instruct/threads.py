"""How many threads a process computes with on the CPU."""

import os

import torch


def usable_cores():
    """CPU cores that this process may use: those that it is pinned to, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_cores(num_processes):
    """Share the cores among the processes of this machine; accelerate launch gives each one thread unless told."""
    torch.set_num_threads(max(1, usable_cores() // num_processes))
