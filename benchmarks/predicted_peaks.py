"""Predicted peaks of published architectures on one card: `python benchmarks/predicted_peaks.py FLUX.1-dev Qwen-Image`

What `--dry_run --memory_gib` says, in GiB, for each architecture and rounding of the base: both LoRA, 8-bit Adam,
checkpointing, offloads, batch 1, ImageReward in bfloat16, and all other arguments that are given. One row of JSON
each; a prediction takes from half a minute to several.
"""

import argparse
import json
import time
from pathlib import Path

from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import GIB, peak, plan
from diff_instruct.training.arguments import parse_args


ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ROOT / "benchmarks" / "architectures"
SMALL = (
    "--dry_run --mixed_precision bf16 --reward image_reward --reward_dtype bf16 --train_batch_size 1 "
    "--num_eval_images 2 --gradient_checkpointing --use_8bit_adam --offload_text_encoder --offload_ema "
    "--lora_rank 64 --ta_lora_rank 64"
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", choices=sorted(p.name for p in ARCHITECTURES.iterdir()))
    parser.add_argument("--kinds", nargs="+", default=["none", "int8", "nf4"])
    ours, rest = parser.parse_known_args()
    for name in ours.architectures:
        for kind in ours.kinds:
            command = [*SMALL, "--pretrained_model_name_or_path", str(ARCHITECTURES / name), "--base_quantization"]
            command += [kind, "--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"), *rest]
            args, start = parse_args(command), time.process_time()
            models = models_of(args)
            base = plan(args, models, "bf16")["reference"]["weights"]
            phase, need = peak(args, models, "bf16")
            row = {"model": name, "base": kind, "base, GiB": round(base / GIB, 1), "peak, GiB": round(need / GIB, 1)}
            print(json.dumps(row | {"in": phase, "processor s": round(time.process_time() - start)}), flush=True)


if __name__ == "__main__":
    main()
