"""Optimizers, learning rates, the generator's average, and what happens when a gradient is not finite."""

import torch
from diffusers.optimization import get_scheduler

from diff_instruct.models.lora import trainable


MAX_NONFINITE_STEPS = 3


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
