"""Real architectures at full size with random weights: `python benchmarks/full_size.py sd15 --mixed_precision bf16`.

Builds the pipeline of one of `benchmarks/architectures` in a temporary folder, with random weights, runs alignment
steps of the training script on it, and prints seconds per step and, on a GPU, peak memory beside the plan. T5 is built
with one of its 24 layers: the prompts are nothing but random embeddings here. All other arguments are those of the
training script.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers

import train_diff_instruct_pp as script
from diff_instruct.models.memory_plan import GIB, plan
from diff_instruct.models.sources import models_of
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.optimizer import Trained


ROOT = Path(__file__).resolve().parents[1]


ARCHITECTURES = {
    "pixart": "PixArt-XL-2-512x512",
    "sd15": "stable-diffusion-v1-5",
    "sdxl": "stable-diffusion-xl-base-1.0",
}


def tokenizer(class_name):
    """A tokenizer of the family that knows letters only."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if class_name == "T5Tokenizer":
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -1.0) for c in letters)]
        return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def build(source, folder, device):
    """Write the pipeline of an architecture, with random weights in bfloat16, to a folder."""
    index, dtype = json.loads((source / "model_index.json").read_text()), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
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
                model = cls.from_config(cls.load_config(source, subfolder=name))
            else:
                config = cls.config_class.from_pretrained(source, subfolder=name)
                config.num_layers = 1 if class_name == "T5EncoderModel" else config.num_hidden_layers
                model = cls(config)
        model.save_pretrained(folder / name)
        del model
    torch.set_default_dtype(dtype)
    (folder / "model_index.json").write_text(json.dumps(index))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--steps", type=int, default=10)
    ours, rest = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(ROOT / "benchmarks" / "architectures" / ARCHITECTURES[ours.architecture], folder / "model", device)
        args = parse_args(
            ["--pretrained_model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out"),
             "--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"), "--max_train_steps", str(ours.steps),
             "--reward", "pocket", "--num_eval_prompts", "1", "--num_eval_images", "2", "--train_batch_size", "1",
             "--validation_prompts", "an apple", "--validation_steps", "0", "--checkpointing_steps", "0",
             "--report_to", "none", "--logging_steps", "1", *rest]
        )  # fmt: skip
        planned = plan(args, models_of(args), args.mixed_precision or "no")
        stamps, peaks, step = [], [], Trained.step

        def stepped(stepper):  # called twice an iteration
            result = step(stepper)
            if device == "cuda":
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated())
            stamps.append(time.perf_counter())
            return result

        Trained.step = stepped
        try:
            script.main(args)
        finally:
            Trained.step = step
        seconds = [b - a for a, b in zip(stamps[1::2], stamps[3::2])] or [stamps[1] - stamps[0]]
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"{ours.architecture} on {where}, batch {args.train_batch_size}, {' '.join(rest)}")
        print(f"seconds per step: {min(seconds):.2f} .. {max(seconds):.2f} (after the first)")
        print(f"planned, without activations: {sum(sum(row.values()) for row in planned.values()) / GIB:.2f} GiB")
        if peaks:
            print(f"peak of PyTorch's allocations while training: {max(peaks) / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
