"""One plain training loop for the networks of the pocket reference: resumable, averaged, logged."""

import csv
import math
import os
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm


def learning_rate(step, steps, lr, warmup, hold):
    """Linear warm-up, then constant until the share `hold` of the steps, then a cosine to 2%."""
    progress = max(0, step / steps - hold) / (1 - hold)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


def steps_done(name, work_dir):
    """How many steps the last state of a stage has seen; raises FileNotFoundError if it has none."""
    return torch.load(Path(work_dir) / f"{name}.pt", map_location="cpu", weights_only=True)["step"]


def fit(
    name, networks, loss_fn, steps, lr, work_dir, accelerator,
    ema_decay=0.999, warmup=100, hold=0.0, every=100, seed=0,
):  # fmt: skip
    """Minimise `loss_fn(generator) -> scalar` over the parameters of `networks`; leaves their averages in them.

    The random numbers of step n come from (seed, n) alone, so a stage that was killed continues exactly; the learning
    rate is that of `learning_rate`. With several processes gradients are averaged: let each take its share of a batch.
    Writes `work_dir/<name>.csv` (step, loss, lr) and `work_dir/<name>.pt`; a finished stage only loads its result.
    """
    state_file, log_file = Path(work_dir) / f"{name}.pt", Path(work_dir) / f"{name}.csv"
    net = torch.nn.ModuleList(networks).to(accelerator.device)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
        first = state["step"]
    net.train()
    rows = []
    quiet = not accelerator.is_main_process
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10, disable=quiet)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, hold)
        with accelerator.autocast():
            loss = loss_fn(torch.Generator().manual_seed(seed * 1_000_003 + step))
        loss.backward()
        if accelerator.num_processes > 1:
            gradients = [p.grad for p in parameters]
            averaged = accelerator.reduce(parameters_to_vector(gradients), "mean")
            vector_to_parameters(averaged, gradients)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 20 == 0:
            rows.append((step, f"{loss.item():.5f}", f"{group['lr']:.2e}"))
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if accelerator.is_main_process and ((step + 1) % every == 0 or step + 1 == steps):
            state = {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            with log_file.open("a", newline="") as f:
                csv.writer(f).writerows(rows)
            rows = []
    ema.copy_to(parameters)
    net.eval()
