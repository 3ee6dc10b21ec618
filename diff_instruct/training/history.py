"""The history of a run: figures, curves, and pictures for the trackers."""

import json
import time
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from diff_instruct.evaluation.cost import peak_gib


PANELS = {
    "reward (training batch)": ["reward", "reward_*"],
    "judged on held-out prompts": ["val_reward", "val_reward_*", "val_heldout", "val_heldout_*"],
    "diversity within a prompt": ["val_diversity"],
    "loss of the teaching assistant": ["ta_loss"],
    "gradient at x0, norm per sample": ["norm_reward", "norm_divergence", "norm_cfg"],
    "x0": ["x0_mean", "x0_std"],
}
TIMINGS = ("seconds_per_step", "images_per_second", "peak_memory_gib")


class Averages:
    """Figures of one optimizer step, averaged over its micro-batches and the processes with one exchange."""

    def __init__(self):
        self.seen = {}

    def add(self, figures):
        """Remember scalar tensors by name; nothing is waited for."""
        for key, value in figures.items():
            self.seen.setdefault(key, []).append(value.detach().float())

    def take(self, accelerator):
        """Means by name, plain numbers; all processes must have the same names. Then they are forgotten."""
        if not self.seen:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self.seen.values()])
        names, self.seen = list(self.seen), {}
        return dict(zip(names, accelerator.reduce(means, "mean").tolist()))


class Speed:
    """Seconds per step, images per second and peak memory since the last look, as `TIMINGS` names them."""

    def __init__(self, device, images_per_step):
        self.device, self.images_per_step = device, images_per_step
        self.steps, self.started = 0, time.perf_counter()

    def pause(self):
        """What follows, until `go_on`, is no training: judging, writing."""
        self.paused = time.perf_counter()

    def go_on(self):
        self.started += time.perf_counter() - self.paused

    def take(self):
        """The figures of the steps since the last call."""
        seconds, self.steps = (time.perf_counter() - self.started) / max(self.steps, 1), 0
        self.started = time.perf_counter()
        return dict(zip(TIMINGS, (seconds, self.images_per_step / seconds, peak_gib(self.device))))


class History:
    """The logged figures of a run, one JSON object a line.

    Args:
        first_step (`int`): of a resumed run; what it will repeat is dropped, the first row, of the generator before
            training, is not. None: a new run.
    """

    def __init__(self, output_dir, first_step=None):
        self.path, self.rows = Path(output_dir) / "history.jsonl", []
        if first_step is not None and self.path.exists():
            before, *rows = (json.loads(line) for line in self.path.read_text().splitlines())
            self.rows = [before, *(row for row in rows if row["step"] <= first_step)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, accelerator, step, figures):
        """Append figures, and hand them to the trackers, which do not take a warm-up's negative steps."""
        self.rows.append({"step": step, **figures})
        with self.path.open("a") as f:
            f.write(json.dumps(self.rows[-1]) + "\n")
        if step >= 0:
            accelerator.log(figures, step=step)

    def plot(self, file):
        """Draw `curves.png`."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, PANELS.items()):
            logged = sorted({k for row in self.rows for k in row if any(fnmatch(k, pattern) for pattern in keys)})
            for key in logged:
                points = [(row["step"], row[key]) for row in self.rows if key in row]
                axis.plot(*zip(*points), marker="." if key.startswith("val") else None, label=key.removeprefix("val_"))
                axis.legend()
            axis.set(title=title, xlabel="generator step")
            axis.grid(alpha=0.3)
        figure.savefig(file, dpi=90)
        plt.close(figure)


def log_images(accelerator, step, images, prompts):
    """Validation pictures to TensorBoard, Weights & Biases and Trackio."""
    array = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", array, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            library = import_module(tracker.name)
            pictures = [library.Image(a, caption=p) for a, p in zip(array, prompts)]
            tracker.log({f"validation/{i}": picture for i, picture in enumerate(pictures)}, step=step)
