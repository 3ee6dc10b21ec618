"""Runs of the training script side by side on the pocket reference: trained, judged, tabled and drawn.

`five_settings.py`, `five_methods.py` and `one_change.py` say which runs. Every run starts from the committed one-step
generator and differs in its arguments and its seed only. Finished runs are kept in the work directory under the name
of their arguments, and are not made again, whichever script asks for them.

They are judged on the pocket's 64 held-out prompts, pairs of noun and colour or background that neither reference nor
generator nor reward has seen, by the trained reward, by a scorer that nothing is trained on, and by the truth
(`pocket.truth`).
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from queue import Queue

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diff_instruct.evaluation.judge import judge_images
from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.pictures import real_pictures
from diff_instruct.evaluation.statistics import mean_with_interval
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import models_of
from diff_instruct.rewards.loading import load_mix, load_scorers
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.environment import usable_cores
from pocket.build import BEST_GUIDANCE


ROOT = Path(__file__).resolve().parents[1]


N_IMAGES = 4
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}
COMMON = (
    "--validation_steps 25 --num_eval_prompts 16 --logging_steps 5 "
    "--checkpointing_steps 25 --checkpoints_total_limit 1"
)
METRICS = {
    "reward": "`pocket` (trained)",
    "heldout": "`pocket_heldout` (not trained)",
    "background": "background",
    "colour": "colour",
    "noun": "noun",
    "truth": "truth, the mean of the three",
    "diversity": "diversity",
}
GAINED = ("reward", "heldout", "noun", "truth", "diversity")  # background and colour are right nearly always


def parser(description):
    """The arguments that all of them take."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--max_train_steps", type=int, default=50, help="generator steps of every run")
    p.add_argument("--seeds", type=int, default=3, help="of every run; seeds that are there already count, too")
    p.add_argument("--work_dir", default=str(ROOT / "pocket-build" / "runs"), help="where runs are kept")
    p.add_argument("--at_once", type=int, default=usable_cores(), help="runs side by side, one thread each")
    return p


def setting(cfg_scale, reward_scale, cfg_interval="0 1", changes=""):
    """The arguments of (α_cfg, α_rew), guided at all noise levels, as in the papers, unless said otherwise."""
    guided = f" --cfg_interval {cfg_interval}" if cfg_scale != 1 else ""  # α_cfg 1 is no guidance
    return f"--cfg_scale {cfg_scale} --reward_scale {reward_scale}{guided} {changes}".rstrip()


def folder_of(arguments, args, seed):
    """Where the run is kept: `--cfg_scale 1 --reward_scale 0` with seed 2 in `cfg_scale-1-reward_scale-0-2`."""
    name = re.sub(r"[^\w.+*]+", "-", f"{arguments} {seed}").strip("-").replace("*", "star")
    return Path(args.work_dir) / f"{args.max_train_steps}-steps" / name


def finished(arguments, args):
    """Folders of the runs with these arguments, seed 0 first, be they more than `args.seeds` or fewer."""
    folders = (folder_of(arguments, args, seed) for seed in count())
    return list(takewhile(lambda folder: (folder / "training_summary.json").exists(), folders))


@contextmanager
def core_of(cores):
    """A core out of the queue, and back into it."""
    core = cores.get()
    try:
        yield core
    finally:
        cores.put(core)


def train(settings, args):
    """Train the arguments of all `settings` with every seed, each run on a core of its own."""
    common = f"--max_train_steps {args.max_train_steps} {COMMON}"
    jobs = {
        folder_of(arguments, args, seed): f"--seed {seed} {common} {arguments}"
        for seed in range(args.seeds)
        for arguments in settings.values()
    }
    train_in(jobs, args.at_once)


def train_in(jobs, at_once):
    """The training script with the arguments of every folder in `jobs`, unless it has finished there.

    Raises:
        RuntimeError: if a run fails; no more are begun then.
    """
    pinned = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = Queue()
    for k in range(at_once):
        cores.put(pinned[k % len(pinned)] if pinned else None)

    def one(folder, arguments):
        if not (folder / "training_summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "train_diff_instruct_pp.py", "--output_dir", str(folder), *arguments.split()]
            resume = ["--resume_from_checkpoint", "latest"] if list(folder.glob("checkpoint-*")) else []
            with (folder / "log.txt").open("a") as log, core_of(cores) as core:
                run = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=log, stderr=log)
                if core is not None:
                    os.sched_setaffinity(run.pid, {core})
                if run.wait():
                    raise RuntimeError(f"{shlex.join(command)} failed; see {folder}/log.txt")
        bar.update()

    with tqdm(total=len(jobs), desc="runs") as bar, ThreadPoolExecutor(at_once) as pool:
        try:
            for job in [pool.submit(one, *job) for job in jobs.items()]:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure no more are begun


class Judge:
    """Scores and truth of images of the pocket's held-out prompts."""

    def __init__(self, work_dir):
        args = parse_args(["--output_dir", work_dir])
        self.models = models_of(args)
        self.stock = load_reference(self.models, torch.float32)
        self.before = load_generator(self.models, self.stock)
        trained, reported = read_rewards(args)
        self.reward, self.heldout = load_mix(trained, "cpu"), load_scorers(reported, "cpu")
        self.prompts = Path(args.eval_prompts).read_text().splitlines()
        self.shown = self.prompts[:8]
        self.real = dict(zip(self.prompts, real_pictures(args.validation_images, self.prompts)))

    @torch.no_grad()
    def __call__(self, file, draw):
        """Scores as in `evaluate` and the pictures shown, of `draw(prompts, z)`, which returns pixels in [0, 1]."""
        if not file.exists():
            shape, rows = self.before.latent_shape(), []
            for i, prompt in enumerate(tqdm(self.prompts, desc=file.parent.name, leave=False)):
                c = [prompt] * N_IMAGES
                pixels = draw(c, fixed_noise(shape, i, N_IMAGES))
                row = judge_images(pixels, c, self.reward, self.heldout)
                told = self.heldout["pocket_truth"].measure(pixels, c)
                rows.append({**row, **told, "truth": torch.stack(list(told.values())).nanmean(dim=0)})
            scores = {k: torch.stack([row[k] for row in rows]) for k in METRICS}
            pictures = torch.cat([draw([p], fixed_noise(shape, 1000 + i, 1)) for i, p in enumerate(self.shown)])
            save_file({k: v.contiguous() for k, v in {**scores, "pictures": pictures}.items()}, file)
        return load_file(file)

    def draw_real(self, prompts, z):
        """The real picture of each prompt, whatever the noise."""
        return torch.stack([self.real[prompt] for prompt in prompts])

    @torch.no_grad()
    def distance(self, pipe):
        """Root mean squared difference of a one-step pipeline's pixels in [0, 1] from the real picture's, (P,): no
        network's opinion. The other icon set's picture counts as different, too, so the level says little."""
        shape, draw, distances = pipe.latent_shape(), one_step(pipe), []
        for i, prompt in enumerate(self.prompts):
            difference = draw([prompt] * N_IMAGES, fixed_noise(shape, i, N_IMAGES)) - self.real[prompt]
            distances.append(difference.square().flatten(1).mean(dim=1).sqrt().mean())
        return torch.stack(distances)

    def reference(self, steps, guidance):
        """How the reference draws: by its own sampler, or x̂0 at the last timestep if it is one step."""
        stock, side = self.stock, self.models.grid.side
        if steps == 1:  # PixArt-α's own sampler has no single step
            stock = type(stock).from_pipe(
                stock, scheduler=DDIMScheduler.from_config(stock.scheduler.config, **TRAILING)
            )
        return lambda prompts, z: self.models.family.sample(stock, prompts, z, steps, guidance, (side, side))


def one_step(pipe):
    """How a one-step pipeline draws: pixels (B, 3, H, W) in [0, 1] of B prompts from noise z."""
    return lambda prompts, z: pipe(prompts, latents=z, output_type="pt").images


def judge_all(settings, args):
    """Scores by label, each stacked over seeds: (S, P, n), (S, P) for diversity; and pictures of seed 0."""
    judge, work_dir = Judge(args.work_dir), Path(args.work_dir)
    scores = {
        "real pictures": [judge(work_dir / "real.safetensors", judge.draw_real)],
        "reference, 1 step": [judge(work_dir / "reference-1.safetensors", judge.reference(1, 4.5))],
        **{
            f"reference, 25 steps, guidance {g}": [
                judge(work_dir / f"reference-25-{g}.safetensors", judge.reference(25, g))
            ]
            for g in (1.0, BEST_GUIDANCE, 4.5)
        },
        "before": [judge(work_dir / "before.safetensors", one_step(judge.before))],
    }
    for label, arguments in settings.items():
        scores[label] = []
        for folder in finished(arguments, args):
            pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
            scores[label].append(judge(folder / "scores.safetensors", one_step(pipe)))
    pictures = {label: rows[0]["pictures"] for label, rows in scores.items()}
    stacked = {label: {k: torch.stack([row[k] for row in rows]) for k in METRICS} for label, rows in scores.items()}
    return stacked, pictures, judge.shown


def tables(settings, pairs, file, args):
    """Train, judge, and write and print the tables. Returns scores, pictures and their prompts."""
    started = time.time()
    train(settings, args)
    scores, pictures, prompts = judge_all(settings, args)
    parts = [means(scores), gains(scores, settings), paired(scores, pairs, settings), spreads(scores)]
    parts.append(provenance(settings, args, started))
    text = "\n\n".join(filter(None, parts))
    Path(file).write_text(text + "\n")
    print(text)
    return scores, pictures, prompts


def over_prompts(values):
    """(P,) or (P, n) from (S, P) or (S, P, n): the mean over seeds, prompts as the first axis for the bootstrap."""
    return values.double().mean(dim=0)


def table(first, rows, metrics=METRICS):
    """Markdown: a column for each metric; rows of (name, function from a metric to its cell)."""
    lines = [f"| {first} | " + " | ".join(METRICS[k] for k in metrics) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(cell, metrics)) + " |" for name, cell in rows])


def means(scores):
    """Means with their 95% intervals over prompts."""

    def cell(values, key):
        mean, (low, high) = mean_with_interval(over_prompts(values[key]))
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    return table("mean", [(label, partial(cell, values)) for label, values in scores.items()])


def spreads(scores):
    """The least and the greatest mean among the seeds of training, of what has several; or None."""

    def cell(values, key):
        seeds = values[key].flatten(1).mean(dim=1)
        return f"{seeds.min():.3f} to {seeds.max():.3f}"

    counts = {label: len(values["reward"]) for label, values in scores.items()}
    rows = [(f"{label} | {n}", partial(cell, scores[label])) for label, n in counts.items() if n > 1]
    return table("least and greatest | seeds", rows) if rows else None


def difference(one, other, key):
    """Paired, (S, P) or (S, P, n) of both: the same prompts and the same noise."""
    mean, (low, high) = mean_with_interval(over_prompts(one[key]) - over_prompts(other[key]))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def gains(scores, settings, start="before"):
    """Differences of what was trained to what it started from."""
    rows = [(f"{label} | {len(scores[label]['reward'])}", scores[label]) for label in settings]
    cells = [(name, partial(difference, values, scores[start])) for name, values in rows]
    return table("gain | seeds", cells, GAINED)


def paired(scores, pairs, settings):
    """Differences of two labels each; of two that were trained, over the seeds that both have."""

    def cell(a, b, key):
        both = min(len(scores[a][key]), len(scores[b][key])) if a in settings and b in settings else None
        return difference({key: scores[a][key][:both]}, {key: scores[b][key][:both]}, key)

    return table("difference", [(f"{a} − {b}", partial(cell, a, b)) for a, b in pairs])


def curves(settings, args, file):
    """What validation saw while training: mean of the seeds, and a band from the least to the greatest."""
    panels = {
        "val_reward": "pocket (trained)",
        "val_heldout": "pocket_heldout (not trained)",
        "val_heldout_pocket_truth": "truth: background, colour and noun",
        "val_diversity": "diversity",
    }
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for label, arguments in settings.items():
        runs = []
        for folder in finished(arguments, args):
            lines = (folder / "history.jsonl").read_text().splitlines()
            runs.append([row for row in map(json.loads, lines) if "val_reward" in row])
        for axis, key in zip(axes, panels):
            values = np.array([[row[key] for row in run] for run in runs])
            steps = [row["step"] for row in runs[0]]
            (line,) = axis.plot(steps, values.mean(axis=0), marker=".", label=label)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.15, color=line.get_color())
    for axis, title in zip(axes, panels.values()):
        axis.set(title=title, xlabel="generator step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def provenance(settings, args, started):
    """The line under a table: command, steps, date, commit, time."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    folders = [folder for arguments in settings.values() for folder in finished(arguments, args)]
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in folders]
    minutes = sum(s["seconds"] for s in summaries) / 60
    command = shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, commit {commit.strip()}; {args.max_train_steps} steps, "
        f"{len(folders)} runs, torch {torch.__version__}. {(time.time() - started) / 60:.0f} minutes; training alone "
        f"{minutes:.0f} minutes of one core, all runs together."
    )
