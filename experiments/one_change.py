"""The first command with one thing changed at a time, on the pocket reference: `python experiments/one_change.py`.

What does guidance of 4.5 do to this reference? Which of the suspects is why it harms at all noise levels? Which
`--weighting` is best? What does the reward do where nothing holds it? What does a rounded base cost? Every run starts
from the committed one-step generator with (α_cfg, α_rew) = (4.5, 10), guided at the lower half of the noise levels
unless said otherwise.
Weightings are compared twice: with that α_rew, and with a reward that pulls as hard as the divergence, since they
weigh the divergence differently. `--only` names the questions asked. Writes `one_change_<question>.md` and `.png`
beside this file, and for the reward's questions how far pictures are from the real ones, and a sheet of them.
Differences are to the first of a question.
"""

from functools import partial
from pathlib import Path

import pocket_runs as runs
import torch
from pocket_judge import Judge, pipelines
from pocket_tables import curves, tables

from diff_instruct.evaluation.pictures import image_grid
from diff_instruct.evaluation.statistics import mean_with_interval
from diff_instruct.objectives import WEIGHTINGS


changed = partial(runs.setting, 4.5, 10, "0 0.5")
BALANCED = "--cfg_scale 4.5 --cfg_interval 0 0.5 --reward_ratio 1 --reward_ratio_steps 5"
ADAPTERS = "--lora_rank 32 --ta_lora_rank 32 --learning_rate 1e-3"
QUESTIONS = {
    "guidance": {
        "4.5 at the lower half (the first command's)": changed(),
        "none (α_cfg 1)": runs.setting(1, 10),
        "2 at all levels": runs.setting(2, 10),
        "4.5 at all levels": runs.setting(4.5, 10),
        "4.5 at the upper half": runs.setting(4.5, 10, "0.5 1"),
    },
    "weighting": {f"`{name}`": changed("" if name == "x0" else f"--weighting {name}") for name in WEIGHTINGS},
    "balanced": {f"`{name}`": f"{BALANCED} --weighting {name}" for name in WEIGHTINGS},
    "reward": {
        "α_rew 0": runs.setting(4.5, 0, "0 0.5"),
        "α_rew 10": changed(),
        "α_rew 100": runs.setting(4.5, 100, "0 0.5"),
        "α_rew 10,000": runs.setting(4.5, 10_000, "0 0.5"),
    },
    "brake": {  # for more steps
        "α_rew 100": runs.setting(4.5, 100, "0 0.5"),
        "α_rew 10,000": runs.setting(4.5, 10_000, "0 0.5"),
    },
    "guard": {
        "α_rew 10,000": runs.setting(4.5, 10_000, None),
        "with --norm_guard 1000": runs.setting(4.5, 10_000, None, "--norm_guard 1000"),
    },
    "rounding": {  # adapters on the reference; the generator starts as the closest one to the pocket's
        name: runs.setting(4.5, 10, None, f"--base_quantization {kind} {ADAPTERS}")
        for name, kind in (("float32", "none"), ("int8", "int8"), ("nf4", "nf4"))
    },
    "suspects": {
        "4.5 at all levels": runs.setting(4.5, 10),
        "at the lower half": changed(),
        "π(t) up to 0.5": runs.setting(4.5, 10, changes="--max_timestep 0.5"),
        "`eps`": runs.setting(4.5, 10, changes="--weighting eps"),
        "K_TA 3": runs.setting(4.5, 10, changes="--ta_steps 3"),
        "the TA's rate × 3": runs.setting(4.5, 10, changes="--ta_learning_rate 3e-4"),
        "both rates ÷ 3": runs.setting(4.5, 10, changes="--learning_rate 3e-5 --ta_learning_rate 3e-5"),
        "no average": runs.setting(4.5, 10, changes="--no-use_ema"),
        "α_rew 0": runs.setting(4.5, 0),
        "`eps`, α_rew 0": runs.setting(4.5, 0, changes="--weighting eps"),
    },
}


def distances(settings, args):
    """Markdown: how far the pictures are from the real ones, before and after, the mean over seeds."""
    judge, rows = Judge(args.work_dir), ["| | distance to the real picture | change |", "|---|---|---|"]
    before = judge.distance(judge.before)
    rows.append("| before | {:.3f} [{:.3f}, {:.3f}] | |".format(*flat(mean_with_interval(before))))
    for label, arguments in settings.items():
        pipes = pipelines(runs.finished(arguments, args))
        after = torch.stack([judge.distance(pipe) for pipe in pipes]).mean(dim=0)
        both = *flat(mean_with_interval(after)), *flat(mean_with_interval(after - before))
        rows.append(f"| {label} " + "| {:.3f} [{:.3f}, {:.3f}] | {:+.3f} [{:+.3f}, {:+.3f}] |".format(*both))
    return "\n".join(rows)


def flat(mean_and_interval):
    """(mean, low, high) of (mean, [low, high])."""
    mean, interval = mean_and_interval
    return mean, *interval


def main():
    out = Path(__file__).with_suffix("")
    parser = runs.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions asked")
    args = parser.parse_args()
    for question in args.only:
        settings, file = QUESTIONS[question], f"{out}_{question}"
        if args.max_train_steps != parser.get_default("max_train_steps"):
            file += f"_{args.max_train_steps}"
        first, *others = settings
        _, pictures, prompts = tables(settings, [(label, first) for label in others], f"{file}.md", args)
        curves(settings, args, f"{file}.png")
        if question in ("reward", "brake", "guard"):
            text = distances(settings, args)
            print(text)
            with Path(f"{file}.md").open("a") as table:
                table.write(f"\n{text}\n")
            columns = {label: pictures[label] for label in ("real pictures", "before", *settings)}
            columns = {label.replace("α_rew", "reward scale"): images for label, images in columns.items()}
            image_grid(columns, prompts).save(f"{file}_grid.jpg", quality=85)


if __name__ == "__main__":
    main()
