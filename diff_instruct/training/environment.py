"""What a process computes with: threads, and options that need a package or a GPU."""

import os
import shutil
from functools import partial

import torch
from accelerate.utils import AutocastKwargs
from diffusers.utils import is_bitsandbytes_available, is_xformers_available

from diff_instruct.mistake import Mistake


def check_engine(args):
    """Refuses what accelerate may be configured for and the script does not do.

    Raises:
        Mistake: for float16, DeepSpeed, FSDP of version 1 and options of FSDP.
    """
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise Mistake(f"mixed precision {precision} is not supported: gradients at x0 overflow; take bf16")
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        raise Mistake("DeepSpeed is not supported: take FSDP2, as recipes/4gpu_fsdp2.yaml does")
    if not is_set("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise Mistake("FSDP1 is not supported: set `fsdp_version: 2`, as recipes/4gpu_fsdp2.yaml does")
    if is_set("FSDP_OFFLOAD_PARAMS"):
        raise Mistake("`fsdp_offload_params: true` is not supported: take more processes, or LoRA")
    if is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise Mistake("`fsdp_activation_checkpointing: true` is not supported: it is --gradient_checkpointing here")
    if args.use_8bit_adam:
        raise Mistake("--use_8bit_adam does not work with FSDP2, which divides the optimizer's state: leave it out")
    if args.reuse_generated:
        raise Mistake("FSDP2 gathers weights for one pass, and so needs --no-reuse_generated")
    if args.offload_ema:
        raise Mistake("--offload_ema does not work with FSDP2, which divides the average: leave it out")


def load_whole_everywhere():
    """With FSDP accelerate has transformers leave text encoders and rewards empty, by default, on all processes but
    the first."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def autocast_of(accelerator):
    """The context of mixed precision for each evaluation of a network, without autocast's cache: until torch 2.10 it
    hands a cast that was made without gradient to a pass that needs one, and so cuts the graph."""
    return partial(accelerator.autocast, AutocastKwargs(cache_enabled=False))


def is_set(variable):
    """Whether `accelerate launch` has set it to true."""
    return os.environ.get(variable, "false").lower() == "true"


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
            name = models.family.name
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
