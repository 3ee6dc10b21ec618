"""What a training command asks of a GPU, on paper: `python benchmarks/arithmetic.py PixArt-XL-2-512x512 FLAGS`

Algorithm 1 runs once on tensors without contents, as for `--dry_run --memory_gib`, and PyTorch's counter of floating
point operations looks on. Matrix products, convolutions and attention are counted, what is checkpointed twice; the
reward's network is not, nor are text encoders, optimizers, validations and the export. FLAGS are those of the training
script: `--pretrain_steps` are without reward, `--max_train_steps` as the flags say.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ARCHITECTURES, PUBLISHED, run
from diff_instruct.models.sources import models_of
from diff_instruct.plan import activations as planned
from diff_instruct.rewards.specs import NO_REWARD
from diff_instruct.training.arguments import parse_args


ROOT = Path(__file__).resolve().parents[1]


class Counted(planned.Live):
    """Counts operations where bytes are counted."""

    def highest(self, function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()


def operations(args):
    """TFLOP of an image in a step, the batch's validation left out."""
    models = models_of(args)
    with patch.object(planned, "Live", Counted):
        phases = planned.activations(args, models, "bf16")
    del phases["validation"]
    passes = {"teaching assistant's step": args.ta_steps}
    return sum(flop * passes.get(phase, 1) for phase, flop in phases.items()) / args.train_batch_size / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=PUBLISHED)
    ours, rest = parser.parse_known_args()
    command = ["--pretrained_model_name_or_path", str(ARCHITECTURES / ours.architecture), "--dry_run"]
    command += ["--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"), "--mixed_precision", "bf16", *rest]
    args = parse_args(command)
    without = {"reward": [NO_REWARD], "reward_scale": 0.0, "reward_ratio": None, "cfg_scale": args.pretrain_cfg_scale}
    pretraining = argparse.Namespace(**{**vars(args), **without})
    images = args.train_batch_size * args.gradient_accumulation_steps
    total = 0
    for what, steps, of_stage in (
        ("pretraining", args.pretrain_steps, pretraining), ("alignment", args.max_train_steps, args)
    ):  # fmt: skip
        if steps:
            each = operations(of_stage)
            all_of_it = steps * images * each / 1e6
            total += all_of_it
            print(f"{what}: {each:.1f} TFLOP an image, {steps:,} steps of {images} images: {all_of_it:.3g} EFLOP")
    print(f"together {total:.3g} EFLOP: {total * 1e4 / 3600:.3g} hours at 100 TFLOP/s")


if __name__ == "__main__":
    run(main)
