"""What an iteration costs: `OMP_NUM_THREADS=1 python benchmarks/step_cost.py pixart`

Ways to take the same steps, in turn, in one process, on the same model and batch:

(a) nothing but the network passes that Algorithm 1 needs with K_TA = 1, guidance and a reward, and the optimizers'
    steps: generator forward, TA forward and backward; generator forward and backward, TA forward, reference forward
    for c and ∅, decoder and scorer forward and backward. Prompts are encoded before.
(b) the training script.
(a') and (b'): both with one x0 for TA and generator, as DMD2's schedule has it (`--reuse_generated`): a generator
    forward less.
(c) as one would write it first: prompts and ∅ are encoded in every phase, their padding stays, the reference is called
    for c and then for ∅, and one graph leads from the reward through decoder and generator.

The script draws its prompts from 8, so that all but its first iterations find them encoded.

With `--bases none int8 nf4` in place of these: the script with both LoRA on one frozen base, rounded in each of these
ways, side by side; ratios are to the first.

The models are the pocket reference, or real architectures made small (`SMALL`), with random weights. Medians of
processor seconds on a CPU, of seconds on a GPU; the ratios are the figure.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import mse_loss

import train_diff_instruct_pp as script
from benchmarks import run
from benchmarks.full_size import ARCHITECTURES, ROOT, build
from diff_instruct.command_line import whole
from diff_instruct.models.denoiser import stacked
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.rounding import KINDS
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.rewards.loading import load_mix
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.training import draws, set_up
from diff_instruct.training.arguments import parse_args


VAE = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 16, "sample_size": 256}
CLIP = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
CLIP_G = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 5}
T5 = {"d_model": 512, "d_ff": 1280, "num_layers": 5, "num_heads": 8}
SMALL = {  # latents of 32×32
    "pixart": {
        "transformer": {"num_layers": 6, "num_attention_heads": 4, "cross_attention_dim": 288, "sample_size": 32,
                        "caption_channels": 512},
        "text_encoder": T5, "vae": VAE,
    },
    "sd15": {
        "unet": {"block_out_channels": [64, 128, 192, 192], "cross_attention_dim": 192, "sample_size": 32},
        "text_encoder": CLIP, "vae": VAE,
    },
    "sdxl": {
        "unet": {"block_out_channels": [64, 128, 192], "cross_attention_dim": 512, "sample_size": 32,
                 "transformer_layers_per_block": [1, 2, 4], "projection_class_embeddings_input_dim": 320 + 6 * 256},
        "text_encoder": CLIP, "text_encoder_2": {**CLIP_G, "projection_dim": 320}, "vae": VAE,
    },
}  # fmt: skip


def clock():
    """Seconds: of this process's computing on a CPU, so that others on the machine do not count; else on the wall."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Plain:
    """Sides (a) and (c): what both are made of."""

    def __init__(self, args, prompts):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        models = models_of(args)
        stock = load_reference(models, torch.float32).to(self.device)
        self.args, self.pipe, self.prompts = args, load_generator(models, stock).to(self.device), prompts
        self.generator, self.ref = self.pipe.denoiser.train(), getattr(stock, models.denoiser)
        self.ta = copy.deepcopy(self.ref).requires_grad_(True).train()
        self.reward = load_mix(read_rewards(args)[0], self.device)
        options = {"lr": 1e-5, "betas": (0.0, 0.999), "fused": True}
        self.theta, self.psi = (torch.optim.AdamW(m.parameters(), **options) for m in (self.generator, self.ta))

    def draw(self):
        """z, ε, both (B, C, H, W), and t, (B,)."""
        shape, (low, high) = (len(self.prompts), *self.pipe.latent_shape()), (self.args.min_timestep, 0.98)
        z, eps = torch.randn(2, *shape, device=self.device)
        return z, eps, self.pipe.schedule.timesteps(torch.rand(len(z)), low, high).to(self.device)

    def step(self, optimizer):
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def encode(self):
        c, null = self.pipe.encode_prompt(self.prompts), self.pipe.encode_null()
        return c, {k: v.expand(len(self.prompts), *v.shape[1:]) for k, v in null.items()}

    def bare(self, c, null, reuse=False):
        """(a), (a')"""
        pipe, (z, x_t, t) = self.pipe, self.draw()
        with torch.set_grad_enabled(reuse):
            x0 = pipe.denoise(self.generator, z, t, c)
        pipe.denoise(self.ta, x0.detach(), t, c).square().mean().backward()
        self.step(self.psi)
        if not reuse:
            x0 = pipe.denoise(self.generator, z, t, c)
        with torch.no_grad():
            gradient = pipe.denoise(self.ta, x_t, t, c)
            both = pipe.denoise(self.ref, torch.cat([x_t, x_t]), torch.cat([t, t]), stacked(c, null))
            gradient = gradient - both.chunk(2)[0] - both.chunk(2)[1]
        leaf = x0.detach().requires_grad_()
        gradient += torch.autograd.grad(self.reward(pipe.decode(leaf), self.prompts).sum(), leaf)[0]
        x0.backward(gradient)
        self.step(self.theta)

    def first_draft(self):
        """(c)"""
        pipe, args, (z, eps, t) = self.pipe, self.args, self.draw()
        c, _ = self.encode()
        with torch.no_grad():
            x0 = pipe.generate(self.generator, z, c)
        x_t = pipe.schedule.add_noise(x0, eps, t)
        mse_loss(pipe.schedule.epsilon(pipe.denoise(self.ta, x_t, t, c), x_t, t), eps).backward()
        self.step(self.psi)
        (z, eps, t), (c, null) = self.draw(), self.encode()
        x0 = pipe.generate(self.generator, z, c)
        x_t = pipe.schedule.add_noise(x0, eps, t)
        with torch.no_grad():
            from_ta = pipe.estimate(self.ta, x_t, t, c)
            cond, uncond = pipe.estimate(self.ref, x_t, t, c), pipe.estimate(self.ref, x_t, t, null)
            difference = from_ta - (uncond + args.cfg_scale * (cond - uncond))
        reward = self.reward(pipe.decode(x0), self.prompts)
        ((difference * x0).sum() - args.reward_scale * reward.sum()).backward()
        self.step(self.theta)


def timed(function, *arguments):
    start = clock()
    function(*arguments)
    return clock() - start


def script_seconds(args):
    """Of each iteration of the script itself, from draw to draw, with as many threads as the other sides have."""
    stamps = []

    class Sampler(draws.Sampler):
        def __call__(self):
            stamps.append(clock())
            return super().__call__()

    with patch.object(draws, "Sampler", Sampler), patch.object(set_up, "use_cores", lambda processes: None):
        script.main(args)
    starts = stamps[:: 1 if args.reuse_generated else 2]  # draws an iteration: the TA's and the generator's
    return [b - a for a, b in zip(starts, starts[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["pocket", *SMALL])
    parser.add_argument("--iterations", type=whole(1), default=4, help="on each side in each round")
    parser.add_argument("--rounds", type=whole(1), default=3)
    parser.add_argument("--bases", nargs="+", choices=KINDS, help="compare the script on these")
    ours, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--max_train_steps", str(ours.iterations + 2), "--output_dir", folder + "/out"]
        options += "--overwrite_output_dir --ta_warmup_steps 0 --validation_steps 0 --checkpointing_steps 0".split()
        options += "--report_to none --num_eval_prompts 2 --num_eval_images 2 --cfg_interval 0 1".split()
        options += ["--no-reuse_generated"]
        options += ["--train_prompts", str(ROOT / "pocket" / "prompts_train.txt"), "--max_train_samples", "8"]
        if ours.model != "pocket":
            source = ROOT / "benchmarks" / "architectures" / ARCHITECTURES[ours.model]
            options += ["--train_batch_size", "4", "--reward", "pocket"]
            options += ["--reward_checkpoint", f"pocket={ROOT / 'pocket' / 'scorer'}"]
            parse_args([*options, "--pretrained_model_name_or_path", str(source), *rest])  # mistakes, before building
            options += ["--pretrained_model_name_or_path", folder + "/model"]
            build(source, Path(folder, "model"), "cpu", SMALL[ours.model], torch.float32)
        torch.manual_seed(0)
        compare = compare_bases if ours.bases else compare_ways
        args, seconds = compare(ours, options, rest)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    first = next(iter(medians))
    parts = {"model": ours.model, "batch": args.train_batch_size}
    parts |= {k: round(v / medians[first], 3) for k, v in medians.items()}
    print(json.dumps({**parts, f"{first} seconds": round(medians[first], 3), "options": rest}))


def compare_ways(ours, options, rest):
    """(arguments of the script, seconds of each iteration by side)"""
    args, one_x0 = parse_args(options + rest), parse_args(options + rest + ["--reuse_generated"])
    few = Path(args.train_prompts).read_text().splitlines()[: args.max_train_samples]
    prompts = list(islice(cycle(few), args.train_batch_size))
    sides = "bare", "script", "bare, one x0", "script, one x0", "first draft"
    plain, seconds = Plain(args, prompts), {side: [] for side in sides}
    encode = Conditioning(plain.pipe.encode_prompt, plain.device)
    null = encode.null(plain.pipe.encode_null)
    null = {k: v.expand(len(prompts), *v.shape[1:]) for k, v in null.items()}
    c = encode(prompts)
    for _ in range(ours.rounds):
        seconds["bare"] += [timed(plain.bare, c, null) for _ in range(ours.iterations + 1)][1:]
        seconds["script"] += script_seconds(args)[1:]  # the first one encodes prompts
        seconds["bare, one x0"] += [timed(plain.bare, c, null, True) for _ in range(ours.iterations + 1)][1:]
        seconds["script, one x0"] += script_seconds(one_x0)[1:]
        seconds["first draft"] += [timed(plain.first_draft) for _ in range(ours.iterations + 1)][1:]
    return args, seconds


def compare_bases(ours, options, rest):
    """The same for the script on each base; both roles are LoRA. What is not rounded has the dtype of the script's
    `--mixed_precision`: float32 by default."""
    seconds = {kind: [] for kind in ours.bases}
    options = [*options, "--lora_rank", "16", "--ta_lora_rank", "16", *rest]
    sides = {kind: parse_args([*options, "--base_quantization", kind]) for kind in ours.bases}
    for _ in range(ours.rounds):
        for kind, args in sides.items():
            seconds[kind] += script_seconds(args)[1:]
    return args, seconds


if __name__ == "__main__":
    run(main)
