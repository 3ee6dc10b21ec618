"""The history of a run: figures, curves, and pictures for the trackers."""

import json
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from diff_instruct.evaluation.cost import peak_gib
from diff_instruct.files import NotWritten, write_text, writing
from diff_instruct.training.alerts import Alerts, send


PANELS = {
    "reward (training batch)": ["reward", "reward_*"],
    "judged on held-out prompts": ["val_reward", "val_reward_*", "val_heldout", "val_heldout_*"],
    "diversity within a prompt": ["val_diversity"],
    "losses of the teaching assistant and of pairs": ["ta_loss", "pair_loss"],
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

    def state_dict(self):
        """What was seen so far; nothing is waited for."""
        return {key: list(values) for key, values in self.seen.items()}

    def load_state_dict(self, state, device):
        """Go on from what `state_dict` returned, as tensors or as numbers."""
        self.seen = {key: [torch.as_tensor(v, device=device) for v in values] for key, values in state.items()}

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


def read_rows(path):
    """The rows of a history, without a last line that a kill cut short."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


class History:
    """The logged figures of a run, one JSON object a line.

    Args:
        first_step (`int`): of a resumed run; what it will repeat is dropped, the first row, of the generator before
            training, is not. None: a new run.
    """

    def __init__(self, output_dir, first_step=None):
        self.path, self.rows, self.told = Path(output_dir) / "history.jsonl", [], False
        if first_step is not None and self.path.exists():
            rows = list(read_rows(self.path))
            self.rows = rows[:1] + [row for row in rows[1:] if row["step"] <= first_step]
        self.alerts = Alerts()
        for row in self.rows:  # what was told before is not told again
            self.alerts(row["step"], row)
        self.unsaved = ""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.size = self.path.stat().st_size

    def log(self, accelerator, step, figures):
        """Append figures, and hand them to the trackers, which do not take a warm-up's negative steps.

        What cannot be written now is written with the next figures: the run goes on.
        """
        self.rows.append({"step": step, **figures})
        self.unsaved += json.dumps(self.rows[-1]) + "\n"
        with self.going_on(f"the figures of step {step}"):
            with self.path.open("r+b") as f:
                f.truncate(self.size)  # without the half line that a full disk left
                f.seek(self.size)
                f.write(self.unsaved.encode())
            self.size, self.unsaved = self.path.stat().st_size, ""
        begun = self.alerts(step, figures)
        if step >= 0:
            with self.going_on(f"what trackers log of step {step}"):
                accelerator.log(figures, step=step)
                send(accelerator, begun)

    @contextmanager
    def going_on(self, what):
        """Within: a failure to write is told once, and nothing else."""
        try:
            with writing():
                yield
        except NotWritten as error:
            if not self.told:
                print(f"{what} could not be written: {error}; the run goes on.", flush=True)
            self.told = True

    def plot(self, file):
        """Draw `curves.png`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 6.5), dpi=90)
        axes = figure.subplots(2, 3)
        figure.subplots_adjust(0.045, 0.08, 0.985, 0.95, wspace=0.22, hspace=0.3)  # a layout engine would draw twice
        for axis, (title, keys) in zip(axes.flat, PANELS.items()):
            logged = {k for row in self.rows for k in row if any(fnmatch(k, pattern) for pattern in keys)}
            logged = sorted(logged - {"reward_scale"})  # α_rew would dwarf the reward
            for key in logged:
                points = [(row["step"], row[key]) for row in self.rows if key in row]
                marked = key.startswith("val") or len(points) == 1  # a line needs two
                axis.plot(*zip(*points), marker="." if marked else None, label=key.removeprefix("val_"))
            if logged:
                axis.legend()
            axis.set(title=title, xlabel="generator step")
            axis.grid(alpha=0.3)
        figure.savefig(file)


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
