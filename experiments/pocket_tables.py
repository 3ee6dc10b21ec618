"""Tables and curves of the runs of `pocket_runs`, in Markdown and PNG."""

import json
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from pocket_judge import METRICS, judge_all
from pocket_runs import ROOT, finished, train

from diff_instruct.evaluation.statistics import mean_with_interval


GAINED = ("reward", "heldout", "noun", "truth", "diversity")  # background and colour are right nearly always


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
        return mean_of(values[key])

    return table("mean", [(label, partial(cell, values)) for label, values in scores.items()])


def mean_of(values):
    """The mean of (S, P) or (S, P, n) with its interval, as text."""
    mean, (low, high) = mean_with_interval(over_prompts(values))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


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
