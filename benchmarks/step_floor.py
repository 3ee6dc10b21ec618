"""How far an iteration of Algorithm 1 is from the network passes that it needs: `python benchmarks/step_floor.py`.

Both sides run in one process, in turn, on the pocket reference; the ratio is the figure. The floor of an iteration
with K_TA = 1, guidance and reward: the TA's step (generator forward; TA forward and backward) and the generator's
(generator forward and backward; TA forward; reference forward for c and for ∅; decoder and scorer forward and
backward), and both optimizers' steps.
"""

import argparse
import copy
import json
import statistics
import time

import torch

import train_diff_instruct_pp as script
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import models_of
from diff_instruct.rewards.loading import load_mix
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.training.arguments import parse_args


def bare_iterations(args, n):
    """Seconds of n iterations of nothing but the network passes and optimizer steps."""
    models = models_of(args)
    stock = load_reference(models, torch.float32)
    pipe = load_generator(models, stock)
    generator, reference = pipe.transformer.train(), stock.transformer
    ta, reward = copy.deepcopy(reference).requires_grad_(True).train(), load_mix(read_rewards(args)[0], "cpu")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, betas=(0.0, 0.999)) for m in (generator, ta)]
    prompts = [f"a red apple {i}" for i in range(args.train_batch_size)]
    c = {k: v[:, :8] for k, v in pipe.encode_prompt(prompts).items()}
    z, t = torch.randn(len(prompts), *pipe.latent_shape()), torch.full((len(prompts),), 400)
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        with torch.no_grad():
            x0 = pipe.denoise(generator, z, t, c)
        pipe.denoise(ta, x0, t, c).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        x0 = pipe.denoise(generator, z, t, c)
        with torch.no_grad():
            gradient = pipe.denoise(ta, x0, t, c) - pipe.denoise(reference, x0, t, c)
            gradient += pipe.denoise(reference, x0, t, c)
        part = x0.detach().requires_grad_()
        gradient += torch.autograd.grad(reward(pipe.decode(part), prompts).sum(), part)[0]
        x0.backward(gradient)
        optimizers[0].step()
        optimizers[0].zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def script_iterations(args):
    """Seconds between iterations of the script itself."""
    stamps = []

    class Sampler(script.Sampler):
        def __call__(self):
            stamps.append(time.perf_counter())
            return super().__call__()

    original, script.Sampler = script.Sampler, Sampler
    try:
        script.main(args)
    finally:
        script.Sampler = original
    starts = stamps[::2]  # two draws an iteration: the TA's and the generator's
    return [b - a for a, b in zip(starts, starts[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=15, help="on each side, in three rounds")
    parser.add_argument(
        "--prompts",
        type=int,
        default=32,
        help="different ones: 32 are encoded in the first steps, 1036 are new in each",
    )
    ours = parser.parse_args()
    n = ours.iterations
    args = parse_args(
        f"--max_train_steps {n // 3 + 2} --ta_warmup_steps 0 --validation_steps 0 --checkpointing_steps 0 "
        "--report_to none --num_eval_prompts 2 --output_dir /tmp/step-floor --overwrite_output_dir "
        f"--max_train_samples {ours.prompts}".split()
    )
    torch.manual_seed(0)
    bare, full = [], []
    for _ in range(3):
        bare += bare_iterations(args, n // 3 + 2)[2:]
        full += script_iterations(args)[1:]
    figures = {"bare_seconds": statistics.median(bare), "script_seconds": statistics.median(full)}
    figures["ratio"] = figures["script_seconds"] / figures["bare_seconds"]
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
