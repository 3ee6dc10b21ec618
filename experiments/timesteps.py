"""The timestep t* at which the generator looks, on the pocket reference: `python experiments/timesteps.py`.

One-step generators are distilled at t* = 400 and 625 of 1,000 without reward, as version 0.1 made its committed one,
for 200 steps instead of 600, one seed each. Each is aligned with (α_cfg, α_rew) = (4.5, 10), guided at the lower half
of the noise levels and at all of them. Does an earlier t* keep more diversity, and does it bear guidance at all
levels? Judged as in `pocket_judge`. Writes `timesteps.md` beside this file.
"""

import time
from pathlib import Path

import pocket_runs as runs
import pocket_tables as tables
from pocket_judge import Judge, stacked

from pocket.build import BEST_GUIDANCE


TIMESTEPS = (400, 625)
PRETRAIN = (
    "--pretrained_model_name_or_path pocket/reference --train_prompts pocket/prompts_train.txt "
    "--eval_prompts pocket/prompts_heldout.txt --reward pocket --heldout_reward pocket_heldout pocket_truth "
    f"--pretrain_steps 200 --max_train_steps 0 --pretrain_cfg_scale {BEST_GUIDANCE} --train_batch_size 32 "
    "--learning_rate 2e-4 --validation_steps 200 --checkpointing_steps 100 --checkpoints_total_limit 1"
)
GUIDED = {"4.5 at the lower half": "0 0.5", "4.5 at all levels": "0 1"}


def start_of(t, args):
    """Where the generator that was pretrained at t* is."""
    return Path(args.work_dir) / "pretrained" / f"timestep-{t}"


def settings_of(t, args):
    """{how it is guided: arguments} of its alignments."""
    start = f"--pretrained_generator_name_or_path {start_of(t, args)}"
    return {label: runs.setting(4.5, 10, interval, start) for label, interval in GUIDED.items()}


def main():
    started, args = time.time(), runs.parser(__doc__).parse_args()
    args.work_dir = str(Path(args.work_dir).resolve())
    runs.train_in({start_of(t, args): f"{PRETRAIN} --timestep {t}" for t in TIMESTEPS}, args.at_once)
    for t in TIMESTEPS:
        runs.train(settings_of(t, args), args)
    judge, scores, gains, every = Judge(args.work_dir), {}, [], {}
    for t in TIMESTEPS:
        before = f"t* {t}, pretrained"
        aligned = {f"t* {t}, {label}": arguments for label, arguments in settings_of(t, args).items()}
        scores[before] = stacked(judge.runs([start_of(t, args)]))
        scores |= {k: stacked(judge.runs(runs.finished(arguments, args))) for k, arguments in aligned.items()}
        gains.append(tables.gains(scores, aligned, before))
        every |= aligned
    parts = [tables.means(scores), *gains, tables.spreads(scores), tables.provenance(every, args, started)]
    text = "\n\n".join(filter(None, parts))
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
