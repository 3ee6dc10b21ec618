"""The generator's gradient on a rounded base against that on the same base in bfloat16, at full size.

    python benchmarks/full_size.py sdxl --folder models --steps 1 --lora_rank 64 --ta_lora_rank 64
    python benchmarks/rounded_gradient.py models/sdxl --resolution 512

One step of Algorithm 1 as it begins, both LoRA, without a reward: generator, TA and reference are the base, and what
is left of the divergence is the guidance. Same adapters, noise and timestep on each base, which is loaded alone. A row
of JSON for each rounding: cosine and ratio of norms (rounded ÷ bfloat16) of the gradient of all adapters, of dL/dx0,
and of x0 itself. All other arguments are those of the training script.
"""

import argparse
import gc
import json
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import run
from diff_instruct.models.actors import load_actors
from diff_instruct.models.lora import trained_parameters
from diff_instruct.models.reference import encode_null
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.terms import Alpha, Batch
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.steps import generated, generator_step


ROOT = Path(__file__).resolve().parents[1]


def step(folder, kind, rest, adapters=None):
    """{what: flat float32 tensor} of one step on a base of this rounding, and the adapters that it began with."""
    args = parse_args(
        ["--pretrained_model_name_or_path", folder, "--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"),
         "--lora_rank", "64", "--ta_lora_rank", "64", "--gradient_checkpointing", "--train_batch_size", "1",
         "--mixed_precision", "bf16", "--reward_scale", "0", "--prompt_cache", "prompts", "--dry_run",
         "--base_quantization", kind, *rest]
    )  # fmt: skip
    models = models_of(args)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    torch.manual_seed(args.seed)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.bfloat16, autocast, args)
    pipe, generator = actors.pipe, actors.generator
    theta = trained_parameters(generator.network, "generator")
    if adapters is not None:
        for name, p in theta.items():
            p.data.copy_(adapters[name])
    adapters = {name: p.detach().clone() for name, p in theta.items()}
    for p in theta.values():
        p.requires_grad_(True)
    rng = torch.Generator().manual_seed(args.seed)
    z, eps = (torch.randn(1, *pipe.latent_shape(*models.image_sizes[0]), generator=rng) for _ in range(2))
    with torch.no_grad():
        c = pipe.encode_prompt(["an apple"])
    null = encode_null(models.family, actors.stock, pipe, Conditioning(pipe.encode_prompt, "cpu"))
    batch = Batch(["an apple"], c, z, z[:0], torch.zeros(1, dtype=torch.long), torch.tensor([500]), eps)
    x0 = generated(batch, generator)
    gradient, _ = generator_step(args, actors.ta, actors.ref, null, None, pipe.decode)(
        x0, batch, Alpha(args.cfg_scale)
    )
    x0.backward(gradient)
    of_theta = torch.cat([p.grad.flatten() for p in theta.values() if p.grad is not None])
    return {"adapters": of_theta, "dL/dx0": gradient.flatten(), "x0": x0.detach().flatten()}, adapters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a pipeline, such as full_size.py builds")
    parser.add_argument("--kinds", nargs="+", choices=["int8", "nf4"], default=["int8", "nf4"])
    ours, rest = parser.parse_known_args()
    plain, adapters = step(ours.folder, "none", rest)
    for kind in ours.kinds:
        gc.collect()
        start = time.process_time()
        rounded, _ = step(ours.folder, kind, rest, adapters)
        row = {"base": kind, "with": rest, "processor s": round(time.process_time() - start)}
        for what, v in rounded.items():
            v, w = v.double(), plain[what].double()  # millions of elements
            row[f"cosine, {what}"] = round(torch.cosine_similarity(v, w, dim=0).item(), 4)
            row[f"norm, {what}"] = round((v.norm() / w.norm()).item(), 4)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run(main)
