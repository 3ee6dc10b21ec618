"""Optimizers, learning rates, the generator's average, and what happens when a gradient is not finite."""

from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from diffusers.utils import is_bitsandbytes_available, is_xformers_available

from diff_instruct.lora import trainable


MAX_NONFINITE_STEPS = 3


def check_accelerations(args, device):
    """Options that need a package or a GPU.

    Raises:
        ValueError: in one line, if it is not there.
    """
    if args.use_8bit_adam and not is_bitsandbytes_available():
        raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if args.enable_xformers_memory_efficient_attention:
        if not is_xformers_available():
            raise ValueError("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")
        if device.type != "cuda":
            raise ValueError(
                f"--enable_xformers_memory_efficient_attention needs a CUDA GPU, but this is {device.type}"
            )


def make_optimizer(args, network, learning_rate, steps_per_iteration, total_iterations):
    """AdamW and its learning-rate schedule for one network, which is stepped `steps_per_iteration` times a loop."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        AdamW = torch.optim.AdamW
    optimizer = AdamW(
        trainable(network),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * steps_per_iteration,
        num_training_steps=total_iterations * steps_per_iteration,
    )
    return optimizer, lr_scheduler


class Stepper:
    """Ends a phase of Algorithm 1: clips, steps one optimizer and its schedule, and leaves no gradient behind.

    A gradient that is not finite is counted and not applied (all processes see the same one); after three in a row the
    run stops.
    """

    def __init__(self, accelerator, name, network, optimizer, lr_scheduler, max_grad_norm):
        self.accelerator, self.name, self.network, self.max_grad_norm = accelerator, name, network, max_grad_norm
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.skipped, self.in_a_row = 0, 0

    def __call__(self):
        """Returns True if the step was taken.

        Raises:
            FloatingPointError: after three gradients in a row that are not finite.
        """
        norm = self.accelerator.clip_grad_norm_(trainable(self.network), self.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row == MAX_NONFINITE_STEPS:
            raise FloatingPointError(
                f"the gradient of the {self.name} was not finite {MAX_NONFINITE_STEPS} times in a row; nothing was "
                "applied. Resume from the last checkpoint with a lower learning rate, and look at the reward."
            )
        return finite


def ema_decay(args, pretraining, batch_size, images_seen):
    """Decay per step of the average: constant while aligning; while pretraining a half-life in images (as in EDM) that
    ramps up with the images seen."""
    if not pretraining:
        return args.ema_decay
    halflife = min(args.ema_halflife, args.ema_rampup_ratio * images_seen)
    return 0.5 ** (batch_size / max(halflife, 1e-8))


@contextmanager
def averaged(ema, network):
    """Within: the network's trained weights are their averages (or its own, if `ema` is None)."""
    if ema is None:
        yield
        return
    ema.store(trainable(network))
    ema.copy_to(trainable(network))
    try:
        yield
    finally:
        ema.restore(trainable(network))
