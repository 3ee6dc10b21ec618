"""Truth as a reward that is only numbers, on the pocket reference: `python experiments/black_box.py`.

`pocket_truth` counts what a picture shows of its prompt: no gradient, and four values at most. The surrogate
(`--reward_mode surrogate`) learns it beside two rivals (`rivals.py`), a critic's gradient and smoothing, and the
first command, whose reward is a differentiable scorer of another kind. And background and colour alone (`looks.py`):
does the noun fall? Two learning rates of the surrogate: with 1e-4 its loss rises at once. Processor seconds are those
of whole runs, one thread each. What is not in the reward: the scorer `pocket`, diversity, and the distance to real
pictures. The noun is measured by `pocket_heldout`, which the truth contains. `--only` names some of the settings.
Writes `black_box.md`.
"""

import time
from pathlib import Path

import pocket_runs as runs
import pocket_tables as tables
from one_change import distances
from pocket_judge import Judge, one_step, stacked


NUMBERS = "--reward_mode surrogate --heldout_reward pocket --surrogate_learning_rate"
SURROGATES = {
    f"{what}, surrogate, rate {rate}": runs.setting(4.5, 20, None, f"--reward {reward} {NUMBERS} {rate}")
    for what, reward in (("truth", "pocket_truth"), ("looks", "experiments/looks.py:looks"))
    for rate in ("1e-4", "5e-6")
}
RIVALS = {
    f"truth, {rival}": runs.setting(
        4.5, 0, None, f"--reward none --heldout_reward pocket_truth pocket --rival {rival}"
    )
    for rival in ("critic", "smoothing")
}
SETTINGS = {"the first command's reward": runs.setting(4.5, 10, None), **SURROGATES, **RIVALS}


def processor(settings, args):
    """Markdown: processor seconds of each setting's runs, and over those of the first command's reward. A run that
    was made elsewhere has none."""
    seconds = {
        label: [float(file.read_text()) for f in runs.finished(arguments, args) for file in f.glob("processor_*.txt")]
        for label, arguments in settings.items()
    }
    means = {label: sum(s) / len(s) for label, s in seconds.items()}
    unit = next(iter(means.values()))
    rows = [f"| {label} | {mean:.0f} | {mean / unit:.2f} |" for label, mean in means.items()]
    return "\n".join(["| | processor seconds | ratio |", "|---|---|---|", *rows])


def main():
    parser, started = runs.parser(__doc__), time.time()
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings")
    args = parser.parse_args()
    settings = {label: SETTINGS[label] for label in args.only}
    runs.train({k: v for k, v in settings.items() if k not in RIVALS}, args)
    runs.train({k: v for k, v in settings.items() if k in RIVALS}, args, script="experiments/rivals.py")
    judge = Judge(args.work_dir)
    scores = {
        "real pictures": [judge(Path(args.work_dir) / "real.safetensors", judge.draw_real)],
        "before": [judge(Path(args.work_dir) / "before.safetensors", one_step(judge.before))],
    }
    scores |= {label: judge.runs(runs.finished(arguments, args)) for label, arguments in settings.items()}
    scores = {label: stacked(rows) for label, rows in scores.items()}
    parts = [tables.means(scores), tables.spreads(scores), distances(settings, args), processor(settings, args)]
    text = "\n\n".join(filter(None, [*parts, tables.provenance(settings, args, started)]))
    for label in (" (trained)", " (not trained)"):  # here it is the other way round
        text = text.replace(label, "")
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
