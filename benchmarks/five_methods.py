"""The family side by side on the pocket reference: `python benchmarks/five_methods.py`.

DI, SIM, DI++, DI* and DIDR from one pretrained generator with the same number of steps and the same seeds. Writes
`five_methods.md` (tables) and `five_methods.png` (reward against diversity) beside this file. DI and DI++ are the runs
(1, 0) and (4.5, 10) of `five_settings.py`, and are taken from the work directory if they are there.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pocket_runs as runs


METHODS = {
    "cfg1-rew0": "--preset di",
    "sim": "--preset sim",
    "cfg4.5-rew10": "--preset di++",
    "distar": "--preset di*",
    "didr": "--preset didr",
}
LABELS = {
    "cfg1-rew0": "DI",
    "sim": "SIM",
    "cfg4.5-rew10": "DI++",
    "distar": "DI*",
    "didr": "DIDR",
}
PAIRS = [(name, "before") for name in METHODS] + [(name, "cfg4.5-rew10") for name in ("distar", "didr")]


def scatter(scores, file):
    """Reward against diversity: a point for each seed, a cross for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, ("reward", "heldout")):
        for name in ("before", *METHODS):
            x, y = (scores[name][k].flatten(1).mean(dim=1) for k in ("diversity", key))
            dots = axis.scatter(x, y, s=18, alpha=0.5)
            axis.scatter(
                x.mean(), y.mean(), marker="x", s=60, color=dots.get_facecolor()[0, :3], label=LABELS.get(name, name)
            )
        axis.set(xlabel="diversity within a prompt", ylabel=runs.METRICS[key].replace("`", ""))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main():
    out = Path(__file__).with_suffix("")
    scores, _, _, _ = runs.tables(METHODS, PAIRS, LABELS, f"{out}.md", __doc__)
    scatter(scores, f"{out}.png")


if __name__ == "__main__":
    main()
