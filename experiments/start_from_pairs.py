"""The first command, and what trades its truth for variety: `python experiments/start_from_pairs.py`.

The pocket's generator has learnt pairs of the reference's own (`pocket.build`), so it draws what the reference draws
from the same noise. How much of that variety does alignment leave, and at what truth? The first command, with as many
seeds as asked for; with one seed each: other strengths of the reward, an anchor on such pairs, other settings, and the
pocket's presets of SIM and DI*. All with the first command's number of steps, judged as in `pocket_judge`. Writes
`start_from_pairs.md` and `start_from_pairs.png`, truth against diversity.
"""

import time
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import pocket_runs as runs
import pocket_tables as tables
from pocket_judge import METRICS, N_IMAGES, Judge, one_step, stacked

from diff_instruct.training.arguments import pocket_defaults
from pocket.build import BEST_GUIDANCE


STEPS = pocket_defaults(None)[0]["max_train_steps"]
OF_PAIRS = f"--num_pairs 1024 --pair_sampler_steps 12 --pair_cfg_scale {BEST_GUIDANCE}"
FIRST = {"the first command": runs.setting(4.5, 10, None)}
ANCHORS = (1,)
REWARDS = (30,)
CHANGES = {
    "w(t) `dmd`": runs.setting(4.5, 10, None, "--weighting dmd"),
    "guidance at the lower half": runs.setting(4.5, 10, "0 0.5"),
    "the TA's rate × 2": runs.setting(4.5, 10, None, "--ta_learning_rate 4e-4"),
    "rate 3e-4, falling": runs.setting(4.5, 10, None, "--learning_rate 3e-4 --lr_scheduler linear"),
}


def variants(pairs):
    """{label: arguments} of what is changed, `pairs` the folder of the anchor's."""
    anchored = {a: f"--anchor_scale {a} {OF_PAIRS} --pair_folder {pairs}" for a in ANCHORS}
    return {
        **{f"α_rew {r}": runs.setting(4.5, r, None) for r in REWARDS},
        **{f"anchor {a}": runs.setting(4.5, 10, None, changes) for a, changes in anchored.items()},
        **{f"anchor {a}, α_rew 30": runs.setting(4.5, 30, None, changes) for a, changes in anchored.items()},
        **CHANGES,
        "SIM, the pocket's preset": "--preset sim",
        "DI*, the pocket's preset": "--preset di*",
    }


def chosen(scores):
    """Markdown: the truth of a picture, of the best of a prompt's n for the trained scorer, and of the truest."""

    def best(values, key):
        first = values[key].argmax(dim=-1, keepdim=True)
        return tables.mean_of(values["truth"].gather(-1, first)[..., 0])

    n = N_IMAGES
    head = [f"| truth | of all pictures | of the best of {n} by `pocket` | of the truest of {n} |", "|---" * 4 + "|"]
    rows = [
        f"| {label} | {tables.mean_of(values['truth'])} | {best(values, 'reward')} | {best(values, 'truth')} |"
        for label, values in scores.items()
    ]
    return "\n".join([*head, *rows])


def picture(scores, file):
    """Truth against diversity: a point for each seed."""
    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    for i, (label, values) in enumerate(scores.items()):
        x, y = (values[k].flatten(1).nanmean(dim=1) for k in ("diversity", "truth"))
        axis.scatter(x, y, s=40, marker="os^v"[i // 4], color=f"C{i % 10}", label=label.replace("`", ""))
    axis.set(xlabel="diversity within a prompt", ylabel=METRICS["truth"])
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main():
    parser = runs.parser(__doc__)
    parser.set_defaults(max_train_steps=STEPS)
    started, args = time.time(), parser.parse_args()
    args.work_dir = str(Path(args.work_dir).resolve())
    changed = variants(Path(args.work_dir) / "pairs")
    runs.train(FIRST, args)
    for label, arguments in changed.items():  # one after the other, as they share the folder of pairs
        runs.train({label: arguments}, Namespace(**vars(args) | {"seeds": 1}))
    judge, work_dir = Judge(args.work_dir), Path(args.work_dir)
    scores = {
        "reference, 25 steps": [
            judge(work_dir / f"reference-25-{BEST_GUIDANCE}.safetensors", judge.reference(25, BEST_GUIDANCE))
        ],
        "before": [judge(work_dir / "before.safetensors", one_step(judge.before))],
    }
    settings = FIRST | changed
    scores |= {label: judge.runs(runs.finished(arguments, args)) for label, arguments in settings.items()}
    scores = {label: stacked(rows) for label, rows in scores.items()}
    parts = [tables.means(scores), tables.gains(scores, settings), tables.spreads(scores), chosen(scores)]
    parts.append(tables.provenance(settings, args, started))
    text = "\n\n".join(filter(None, parts))
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    picture(scores, Path(__file__).with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
