"""Predicted peaks of published architectures on one card: `python benchmarks/predicted_peaks.py FLUX.1-dev Qwen-Image`

What `--dry_run --memory_gib` says, in GiB, for each architecture and rounding of the base: both LoRA, 8-bit Adam,
checkpointing, offloads, batch 1, ImageReward in bfloat16, and all other arguments that are given. One row of JSON
each: at its highest while a step is taken or pictures are drawn, and while prompts are encoded. A prediction takes
from half a minute to several. With `--into FILE` rows that are in the file are not predicted again.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks import ARCHITECTURES, PUBLISHED, run
from diff_instruct.mistake import Mistake
from diff_instruct.models.rounding import KINDS
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import GIB, peaks, plan
from diff_instruct.training.arguments import parse_args


ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dry_run --mixed_precision bf16 --reward image_reward --reward_dtype bf16 --train_batch_size 1 "
    "--num_eval_images 2 --gradient_checkpointing --use_8bit_adam --prompt_cache prompts --offload_ema "
    "--lora_rank 64 --ta_lora_rank 64"
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", choices=PUBLISHED)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--into", type=Path)
    ours, rest = parser.parse_known_args()
    known = rows_of(ours.into) if ours.into else []
    for name in ours.architectures:
        for kind in ours.kinds:
            row = {"model": name, "base": kind, "with": rest}
            if row not in known:
                line = json.dumps(row | predicted(name, kind, rest))
                print(line, flush=True)
                if ours.into:
                    with ours.into.open("a") as file:
                        file.write(line + "\n")


def rows_of(path):
    """What the rows of a file are of; it is made if there is none. Raises Mistake if it cannot be written or read."""
    try:
        with path.open("a+") as file:
            file.seek(0)
            lines = file.read().splitlines()
    except OSError as error:
        raise Mistake(f"--into {path} cannot be written: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({k: row[k] for k in ("model", "base", "with")})
        except (ValueError, KeyError, TypeError):
            raise Mistake(f"--into {path}: line {number} is no row of this script: delete it") from None
    return rows


def predicted(name, kind, rest):
    """The figures of a row."""
    command = [*SMALL, "--pretrained_model_name_or_path", str(ARCHITECTURES / name), "--base_quantization", kind]
    command += ["--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"), *rest]
    args, start = parse_args(command), time.process_time()
    models = models_of(args)
    base = plan(args, models, "bf16")["reference"]["weights"]
    phases = {phase: round(size / GIB, 1) for phase, size in peaks(args, models, "bf16").items()}
    encoding = phases.pop("encoding of prompts")
    phase = max(phases, key=phases.get)
    figures = {"base, GiB": round(base / GIB, 1), "peak, GiB": phases[phase], "in": phase, "encoding, GiB": encoding}
    return figures | {"processor s": round(time.process_time() - start)}


if __name__ == "__main__":
    run(main)
