"""What a process computes with: threads, and options that need a package or a GPU."""

import os
import shutil

import torch
from diffusers.utils import is_bitsandbytes_available, is_xformers_available

from diff_instruct.mistake import Mistake


def check_engine(args):
    """Refuses what accelerate may be configured for and the script does not do.

    Raises:
        Mistake: for float16, DeepSpeed or FSDP.
    """
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise Mistake(f"mixed precision {precision} is not supported: gradients at x0 overflow; take bf16")
    for variable, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() == "true":
            raise Mistake(f"{engine} is not supported: run `accelerate config` again for several GPUs without it")


def check_accelerations(args, models, accelerator):
    """Options that need a package, a GPU or a UNet.

    Raises:
        Mistake: in one line, if it is not there.
    """
    device = accelerator.device
    if args.use_8bit_adam and not is_bitsandbytes_available():
        raise Mistake("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if args.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise Mistake("--compile needs a C++ compiler on a CPU, and there is no g++: install it, or set CXX")
    if args.enable_xformers_memory_efficient_attention:
        if models.denoiser != "unet":
            name = models.family.stock.__name__
            raise Mistake(f"--enable_xformers_memory_efficient_attention is for UNets, but the reference is a {name}")
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
