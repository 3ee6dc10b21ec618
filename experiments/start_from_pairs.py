"""A start that keeps the reference's variety, on the pocket reference: `python experiments/start_from_pairs.py`.

A one-step generator learns 3,072 pairs (z, x0) of the reference's own sampler for 400 steps, at t* = 400, and is then
aligned with the first command's settings, with and without an anchor on these pairs. Beside it the committed
generator, 600 steps of Diff-Instruct at t* = 625, and its alignment. Judged as in `pocket_judge`. Writes
`start_from_pairs.md`.
"""

import time
from pathlib import Path

import pocket_runs as runs
import pocket_tables as tables
from pocket_judge import Judge, one_step, stacked

from pocket.build import BEST_GUIDANCE


OF_PAIRS = f"--num_pairs 3072 --pair_sampler_steps 12 --pair_cfg_scale {BEST_GUIDANCE}"
START = (
    "--pretrained_model_name_or_path pocket/reference --train_prompts pocket/prompts_train.txt "
    "--eval_prompts pocket/prompts_heldout.txt --reward pocket --heldout_reward pocket_heldout pocket_truth "
    f"--timestep 400 --pair_steps 400 {OF_PAIRS} --max_train_steps 0 --train_batch_size 32 --learning_rate 2e-4 "
    "--adam_beta1 0.9 --adam_beta2 0.99 --lr_scheduler linear --checkpointing_steps 100 --checkpoints_total_limit 1"
)
ANCHORS = (0, 2)


def settings_of(start):
    """{label: arguments} of the alignments, the committed generator's first."""
    of_pairs = f"--pretrained_generator_name_or_path {start}"
    anchored = f"{OF_PAIRS} --pair_folder {start / 'pairs'}"
    return {"committed, aligned": runs.setting(4.5, 10, "0 0.5")} | {
        f"pairs, aligned, anchor {a}": runs.setting(
            4.5, 10, "0 0.5", f"{of_pairs} --anchor_scale {a} {anchored}" if a else of_pairs
        )
        for a in ANCHORS
    }


def main():
    started, args = time.time(), runs.parser(__doc__).parse_args()
    args.work_dir = str(Path(args.work_dir).resolve())
    start = Path(args.work_dir) / "pretrained" / "pairs"
    runs.train_in({start: START}, args.at_once)
    settings = settings_of(start)
    runs.train(settings, args)
    judge = Judge(args.work_dir)
    scores = {
        "reference, 25 steps": [judge(Path(args.work_dir) / "reference-25.safetensors", judge.reference(25, 2.0))],
        "committed": [judge(Path(args.work_dir) / "before.safetensors", one_step(judge.before))],
        "pairs": judge.runs([start]),
    }
    scores |= {label: judge.runs(runs.finished(arguments, args)) for label, arguments in settings.items()}
    scores = {label: stacked(rows) for label, rows in scores.items()}
    parts = [tables.means(scores), tables.spreads(scores), tables.provenance(settings, args, started)]
    text = "\n\n".join(filter(None, parts))
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
