"""The family side by side on the pocket reference: `python experiments/five_methods.py`.

DI, SIM, DI++, DI* and DIDR from one pretrained generator with the same number of steps and the same seeds, with the
(α_cfg, α_rew) of the papers, and of SIM and DI* with the pocket's own, too; DIDR's are not public. Guidance acts on
the lower half of the noise levels, as in the first command: at all of them 4.5 is too much for this reference
(`five_settings.py`), whatever the method. Writes `five_methods.md` (tables, norms of the gradient's terms) and
`five_methods.png` (reward against diversity) beside this file.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pocket_runs as runs
from pocket_judge import METRICS
from pocket_tables import tables


SETTINGS = {
    "DI": runs.setting(1, 0),
    "SIM": f"--preset sim {runs.setting(7.5, 0, '0 0.5')}",
    "SIM, the pocket's preset": "--preset sim",
    "DI++": runs.setting(4.5, 10, "0 0.5"),
    "DI*": f"--preset di* {runs.setting(7.5, 100, '0 0.5')}",
    "DI*, the pocket's preset": "--preset di*",
    "DIDR": "--preset didr",
}
NORMS = ("norm_divergence", "norm_cfg", "norm_reward")


def norms(settings, args, steps=15):
    """Markdown: how hard each term pulls at x0 in the first steps, the mean over steps and seeds."""
    lines = ["| gradient's norm | " + " | ".join(f"`{k}`" for k in NORMS) + " |", "|---" * (len(NORMS) + 1) + "|"]
    for label, arguments in settings.items():
        files = [folder / "history.jsonl" for folder in runs.finished(arguments, args)]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        logged = [[row[k] for row in rows if 0 < row["step"] <= steps and k in row] for k in NORMS]
        lines.append(f"| {label} | " + " | ".join(f"{sum(v) / len(v):.1f}" if v else "" for v in logged) + " |")
    return "\n".join(lines)


def scatter(scores, file):
    """Reward, held-out scorer and diversity: a point for each seed, a cross for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    for axis, key in zip(axes, ("reward", "heldout")):
        for label in scores:
            x, y = (scores[label][k].flatten(1).mean(dim=1) for k in ("diversity", key))
            dots = axis.scatter(x, y, s=18, alpha=0.5)
            axis.scatter(x.mean(), y.mean(), marker="x", s=60, color=dots.get_facecolor()[0, :3], label=label)
        axis.set(xlabel="diversity within a prompt", ylabel=METRICS[key].replace("`", ""))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main():
    out = Path(__file__).with_suffix("")
    args = runs.parser(__doc__).parse_args()
    pairs = [("SIM", "DI"), ("DI*", "DI"), *((label, "DI++") for label in ("DI*", "DIDR"))]
    scores, _, _ = tables(SETTINGS, pairs, f"{out}.md", args)
    text = norms(SETTINGS, args)
    print(text)
    with Path(f"{out}.md").open("a") as file:
        file.write(f"\n{text}\n")
    scatter({label: scores[label] for label in ("before", *SETTINGS)}, f"{out}.png")


if __name__ == "__main__":
    main()
