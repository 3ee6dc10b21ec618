"""The family side by side on the pocket reference: `python experiments/five_methods.py`.

DI, SIM, DI++, DI* and DIDR from one pretrained generator with the same number of steps and the same seeds. Writes
`five_methods.md` (tables) and `five_methods.png` (reward against diversity) beside this file. DI and DI++ are the runs
(1, 0) and (4.5, 10) of `five_settings.py`, and are taken from the work directory if they are there.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pocket_runs as runs


LABELS = {"di": "DI", "sim": "SIM", "di++": "DI++", "di*": "DI*", "didr": "DIDR"}
SHARED = {"di": (1, 0), "di++": (4.5, 10)}  # settings of `five_settings.py`


def run_name(preset, cfg_scale):
    """The name of a preset's run, with the preset's own guidance or with `cfg_scale`."""
    if preset in SHARED:
        own, reward_scale = SHARED[preset]
        return f"cfg{cfg_scale or own}-rew{reward_scale}"
    return preset.replace("*", "star") + (f"-cfg{cfg_scale}" if cfg_scale else "")


def scatter(scores, labels, file):
    """Reward against diversity: a point for each seed, a cross for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, ("reward", "heldout")):
        for name in scores:
            x, y = (scores[name][k].flatten(1).mean(dim=1) for k in ("diversity", key))
            dots = axis.scatter(x, y, s=18, alpha=0.5)
            axis.scatter(
                x.mean(), y.mean(), marker="x", s=60, color=dots.get_facecolor()[0, :3], label=labels.get(name, name)
            )
        axis.set(xlabel="diversity within a prompt", ylabel=runs.METRICS[key].replace("`", ""))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main():
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--cfg_scale", help="guidance for all methods, instead of the presets'; writes to ..._cfg<scale>"
    )
    args = parser.parse_args()
    names = {preset: run_name(preset, args.cfg_scale) for preset in LABELS}
    guidance = f" --cfg_scale {args.cfg_scale}" if args.cfg_scale else ""
    settings = {name: f"--preset {preset}{guidance}" for preset, name in names.items()}
    labels = {name: LABELS[preset] for preset, name in names.items()}
    aligned = names["di++"]
    pairs = [(name, "before") for name in settings] + [(names[p], aligned) for p in ("di*", "didr")]
    out = str(Path(__file__).with_suffix("")) + (f"_cfg{args.cfg_scale}" if args.cfg_scale else "")
    scores, _, _ = runs.tables(settings, pairs, labels, f"{out}.md", args)
    scatter({name: values for name, values in scores.items() if "reference" not in name}, labels, f"{out}.png")


if __name__ == "__main__":
    main()
