"""What a process computes with: threads, and options that need a package or a GPU."""

import os

import torch
from diffusers.utils import is_bitsandbytes_available, is_xformers_available

from diff_instruct.mistake import Mistake


def check_accelerations(args, device):
    """Options that need a package or a GPU.

    Raises:
        Mistake: in one line, if it is not there.
    """
    if args.use_8bit_adam and not is_bitsandbytes_available():
        raise Mistake("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if args.enable_xformers_memory_efficient_attention:
        if not is_xformers_available():
            raise Mistake("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")
        if device.type != "cuda":
            raise Mistake(f"--enable_xformers_memory_efficient_attention needs a CUDA GPU, but this is {device.type}")


def usable_cores():
    """CPU cores that this process may use: those that it is pinned to, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_cores(num_processes):
    """Share the cores among the processes of this machine; accelerate launch gives each one thread unless told."""
    torch.set_num_threads(max(1, usable_cores() // num_processes))
