"""Whole runs of real architectures at full size with random weights: peak memory beside the plan.

    python benchmarks/full_size.py sd15 --lora_rank 64 --ta_lora_rank 64 --gradient_checkpointing

Builds the pipeline of one of `benchmarks/architectures` in a folder, runs iterations of the training script on it in
bfloat16, evaluation before and after and export included, and prints the highest resident memory (on a GPU: PyTorch's
allocations) of each phase above that of an idle process, and seconds. The reward is ImageReward at its published size
in bfloat16. T5 is built with one of its 24 layers. All other arguments are those of the training script.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers

import train_diff_instruct_pp as script
from benchmarks import run
from benchmarks.reward_cost import full_size
from diff_instruct.evaluation.judge import Judge
from diff_instruct.evaluation.pictures import draw_reference
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import GIB, plan
from diff_instruct.rewards.image_reward import ImageReward
from diff_instruct.training import finish
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.optimizer import Trained


ROOT = Path(__file__).resolve().parents[1]


ARCHITECTURES = {
    "pixart": "PixArt-XL-2-512x512",
    "sd15": "stable-diffusion-v1-5",
    "sdxl": "stable-diffusion-xl-base-1.0",
}
SHORTER = {"pixart": {"text_encoder": {"num_layers": 1}}}  # T5: the prompts are nothing but random embeddings


def tokenizer(class_name):
    """A tokenizer of the family that knows letters only."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if class_name == "T5Tokenizer":
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -1.0) for c in letters)]
        return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def build(source, folder, device, changes, dtype=torch.bfloat16):
    """Write the pipeline of an architecture, with random weights, to a folder; `changes`: part to {key: value}."""
    index, usual = json.loads((source / "model_index.json").read_text()), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    for name, part in index.items():
        if not isinstance(part, list) or part[0] is None:
            continue
        library, class_name = part
        if class_name.endswith("Tokenizer"):
            tokenizer(class_name).save_pretrained(folder / name)
            continue
        cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
        with torch.device(device):
            if library == "diffusers":
                model = cls.from_config({**cls.load_config(source, subfolder=name), **changes.get(name, {})})
            else:
                model = cls(cls.config_class.from_pretrained(source, subfolder=name, **changes.get(name, {})))
        model.save_pretrained(folder / name)
        del model
    torch.set_default_dtype(usual)
    (folder / "model_index.json").write_text(json.dumps(index))


class Watch(threading.Thread):
    """Samples this process's resident memory, fifty times a second; `peaks` has the highest of each phase, in bytes,
    above what the process held before."""

    def __init__(self):
        super().__init__(daemon=True)
        self.phase, self.peaks, self.seconds = "start", {}, {}
        self.idle = self.resident()
        self.start()

    @staticmethod
    def resident():
        """Bytes, pages of mapped files included."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self):
        while True:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.resident() - self.idle)
            time.sleep(0.02)

    def during(self, phase, after, function):
        """The function, in this phase; `after` is the next one."""

        def watched(*args, **options):
            self.phase, start = phase, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[phase] = time.perf_counter() - start
                self.phase = after

        return watched


def random_image_reward(path=None, cache_dir=None):
    """ImageReward at its published size, in bfloat16, with random weights and fixed tokens."""
    return full_size("image_reward", torch.bfloat16)


def measure(args):
    """Run the script; returns a [`Watch`] and the seconds of each iteration."""
    watch, stamps, step = Watch(), [], Trained.step
    ImageReward.from_pretrained = staticmethod(random_image_reward)

    def stepped(trained):  # called twice an iteration
        result = step(trained)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            key = "GPU, " + trained.name
            watch.peaks[key] = torch.cuda.max_memory_allocated()
        stamps.append(time.perf_counter())
        return result

    Trained.step = stepped
    Judge.__call__ = watch.during("validation", "training", Judge.__call__)
    finish.export = watch.during("export", "end", finish.export)
    # two steps of sampling need what 25 need
    finish.draw_reference = watch.during("pictures of the reference", "end", partial(draw_reference, steps=2))
    began = time.perf_counter()
    script.main(args)
    ends = stamps[1::2]
    return watch, [b - a for a, b in zip([began, *ends], ends)]


def command_of(model, steps, rest):
    """The training script's words."""
    return [
        "--pretrained_model_name_or_path", str(model), "--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"),
        "--max_train_steps", str(steps), "--num_eval_prompts", "1", "--num_eval_images", "2",
        "--reward_dtype", "bf16", "--train_batch_size", "1", "--validation_prompts", "an apple",
        "--validation_steps", "0", "--checkpointing_steps", "0", "--report_to", "none", "--logging_steps", "1",
        "--mixed_precision", "bf16", *rest,
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", help="where the models are built, or were; default: a temporary one")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # what the second process is told
    ours, rest = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ROOT / "benchmarks" / "architectures" / ARCHITECTURES[ours.architecture]
    if not ours.measure:  # building in another process leaves none of its memory here
        parse_args(command_of(source, ours.steps, [*rest, "--dry_run"]))  # mistakes, before minutes of building
        if ours.folder:
            Path(ours.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ours.folder) as temporary:
            folder = Path(ours.folder or temporary) / ours.architecture
            if not (folder / "model_index.json").is_file():
                build(source, folder, device, SHORTER.get(ours.architecture, {}))
            command = [sys.executable, __file__, ours.architecture, "--steps", str(ours.steps), "--folder"]
            command += [str(folder), "--measure", *rest, "--output_dir", f"{temporary}/out"]
            large = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
            ended = subprocess.run(command, env={**os.environ, **large})
        sys.exit(ended.returncode)
    args = parse_args(command_of(ours.folder, ours.steps, rest))
    planned = plan(args, models_of(args), args.mixed_precision)
    watch, seconds = measure(args)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{ours.architecture} on {where}: {' '.join(rest)}")
    print(f"planned, without activations: {sum(sum(row.values()) for row in planned.values()) / GIB:.2f} GiB")
    for phase, peak in watch.peaks.items():
        print(f"peak, {phase}: {peak / GIB:.2f} GiB ({watch.seconds.get(phase, float('nan')):.0f} s)")
    print("seconds of each iteration, the first with all that comes before: " + " ".join(f"{s:.1f}" for s in seconds))


if __name__ == "__main__":
    run(main)
