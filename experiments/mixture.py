"""Mode behaviour of the divergences on a two-dimensional mixture of Gaussians: `python experiments/mixture.py`.

The reference is eight Gaussians on a circle, with its exact noised score. The generator is a small MLP z -> x0 that
starts at random, the teaching assistant (TA) a small MLP that is trained along; the loop is Algorithm 1, with the
steps and terms that training takes. Every run trains several seeds side by side, as a stack
of networks that share nothing. Each divergence is run with the noise levels π(t) of the script, 0.02 to 0.98, and with
low ones only, and both again with an affine generator, which can only draw one Gaussian. It draws
`experiments/mixture.png` and prints the table. A sample counts for its nearest mode, near or far.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from diffusers import DDPMScheduler
from torch import nn


matplotlib.use("Agg")

from exact import Exact
from matplotlib import pyplot as plt

from diff_instruct.objectives import denoising_loss
from diff_instruct.terms import IKL, Alpha, Batch, DiffusedReward, LatentReward, ScoreDistance
from diff_instruct.training.steps import GeneratorStep, ta_loss
from pipeline_one_step import Schedule


MODES, RADIUS, STD = 8, 1.4, 0.15
ANGLES = 2 * torch.pi * torch.arange(MODES) / MODES
MEANS = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
schedule = Schedule(DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction"))

ALL, LOW = (0.02, 0.98), (0.02, 0.3)
# title, divergence, α_rew of the diffused reward r(x) = x[0], π(t), hidden layers of the generator
RUNS = [
    ("IKL (DI)", IKL(), 0.0, ALL, 3),
    ("score (SIM)", ScoreDistance(), 0.0, ALL, 3),
    ("IKL, diffused reward (DIDR)", IKL(), 1.0, ALL, 3),
    ("IKL, low noise only", IKL(), 0.0, LOW, 3),
    ("score, low noise only", ScoreDistance(), 0.0, LOW, 3),
    ("IKL, affine generator", IKL(), 0.0, ALL, 0),
    ("score, affine generator", ScoreDistance(), 0.0, ALL, 0),
    ("IKL, affine, low noise only", IKL(), 0.0, LOW, 0),
    ("score, affine, low noise only", ScoreDistance(), 0.0, LOW, 0),
]


class Networks(nn.Module):
    """One MLP for each seed, (seeds, n, inputs) -> (seeds, n, 2): stacked weights, nothing shared."""

    def __init__(self, seeds, inputs, width, hidden=3):
        super().__init__()
        sizes = [inputs, *[width] * hidden, 2]
        uniform = [(torch.rand(seeds, a + 1, b) * 2 - 1) / a**0.5 for a, b in zip(sizes, sizes[1:])]
        self.layers = nn.ParameterList(uniform)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.baddbmm(layer[:, :1], nn.functional.silu(x) if i else x, layer[:, 1:])
        return x


def latents(x):
    """(seeds, n, 2) to the (B, C, H, W) of the objectives."""
    return x.reshape(-1, 2, 1, 1)


def x0_ref(x_t, t):
    """The reference's x̂0 = E[x0 | x_t], exact: Tweedie's formula for each mode, weighed by its posterior."""
    alpha, sigma = (s.flatten(1) for s in schedule(t))
    x, v = x_t.flatten(1), alpha**2 * STD**2 + sigma**2
    off = x[:, None] - alpha[:, None] * MEANS
    posterior = (-(off**2).sum(dim=2) / (2 * v)).softmax(dim=1)
    of_mode = MEANS + (alpha * STD**2 / v)[:, None] * off
    return latents((posterior[:, :, None] * of_mode).sum(dim=1))


class Generator:
    """g_θ, as the steps ask for it."""

    def __init__(self, network):
        self.network = network

    def generate(self, z, c, noise=(), step=None):
        return latents(self.network(z.view(len(self.network.layers[0]), -1, 2)))


class TeachingAssistant(Exact):
    """s_ψ, as the steps ask for it: a v-prediction from x_t and features of the time."""

    def __init__(self, network):
        super().__init__(schedule, lambda x_t, t: schedule.x0(self(x_t, t), x_t, t))
        self.network = network

    def __call__(self, x_t, t):
        alpha, sigma = (s.flatten(1) for s in schedule(t))
        s = t[:, None] / schedule.steps
        waves = [f(torch.pi * k * s) for k in (1, 2, 3) for f in (torch.sin, torch.cos)]
        inputs = torch.cat([x_t.flatten(1), (sigma / alpha).log() / 2, *waves], dim=1)
        return latents(self.network(inputs.view(len(self.network.layers[0]), -1, inputs.shape[1])))

    def loss(self, x_t, eps, t, c):
        return denoising_loss(schedule.epsilon(self(x_t, t), x_t, t), eps)


def train(args, divergence, alpha_rew, noise_levels, hidden):
    """Algorithm 1. Returns samples of the trained generators, (seeds, 4000, 2)."""
    torch.manual_seed(args.seed)
    seeds, rows = args.seeds, args.seeds * args.batch_size
    generator = Generator(Networks(seeds, 2, args.width, hidden))
    ta = TeachingAssistant(Networks(seeds, 9, args.width))
    theta = torch.optim.Adam(generator.network.parameters(), lr=args.learning_rate, betas=(0.0, 0.999))
    psi = torch.optim.Adam(ta.network.parameters(), lr=args.ta_learning_rate, betas=(0.0, 0.999))
    reward = LatentReward(lambda x, prompts: x[:, 0, 0, 0], decode=lambda x: x)
    terms = divergence, DiffusedReward(reward, args.diffused_reward_steps)
    gradient_at_x0 = GeneratorStep(ta, Exact(schedule, x0_ref), {}, terms, args.weighting)

    def draw():
        z, eps = torch.randn(2, rows, 2, 1, 1)
        t = schedule.timesteps(torch.rand(rows), *noise_levels)
        return Batch([""] * rows, {}, z, z[:0], torch.zeros_like(t), t, eps)

    for step in range(args.steps):
        for optimizer, rate in ((theta, args.learning_rate), (psi, args.ta_learning_rate)):
            optimizer.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / args.steps))  # decays in the second half
        # θ is frozen; K_TA times: ψ takes a step on the denoising loss.
        for _ in range(args.ta_steps):
            loss = ta_loss(draw(), generator, ta)
            psi.zero_grad()
            loss.backward()
            psi.step()

        # ψ is frozen; θ takes a step.
        batch = draw()
        x0 = generator.generate(batch.z, batch.c)
        dL_dx0, _ = gradient_at_x0(x0, batch, Alpha(cfg=1.0, rew=alpha_rew))
        theta.zero_grad()
        x0.backward(dL_dx0 / args.batch_size)
        theta.step()
    with torch.no_grad():
        return generator.network(torch.randn(seeds, 4000, 2))


def figures(samples, target):
    """Of one seed's samples (n, 2): covered modes (of at least a quarter of their due share), the least share over
    its due, exp of the entropy, samples within 3 standard deviations of a mode, total variation of the shares."""
    distance, nearest = torch.cdist(samples, MEANS).min(dim=1)
    share = torch.bincount(nearest, minlength=MODES) / len(samples)
    return [
        (share >= target / 4).sum().item(),
        (share / target).min().item(),
        torch.special.entr(share).sum().exp().item(),
        (distance < 3 * STD).float().mean().item(),
        (share - target).abs().sum().item() / 2,
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the generator")
    parser.add_argument("--ta_steps", type=int, default=4, help="K_TA")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first random number")
    parser.add_argument("--batch_size", type=int, default=128, help="for each seed")
    parser.add_argument("--width", type=int, default=64, help="of the networks")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ta_learning_rate", type=float, default=2e-3)
    parser.add_argument("--weighting", default="eps")
    parser.add_argument("--diffused_reward_steps", type=int, default=1)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".png")))
    args = parser.parse_args()
    start = time.time()

    torch.manual_seed(args.seed)
    picture = [("reference", MEANS[torch.randint(MODES, (4000,))] + STD * torch.randn(4000, 2))]
    print("| run | covered modes | least share / due | exp(entropy) | within 3 std | TV of shares |")
    print("|---|---|---|---|---|---|")
    for title, divergence, alpha_rew, *how in RUNS:
        samples = train(args, divergence, alpha_rew, *how)
        target = (alpha_rew * MEANS[:, 0]).softmax(dim=0)  # p_ref exp(α_rew r): every mode is tilted alike within
        rows = torch.tensor([figures(s, target) for s in samples])
        cells = [
            f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in zip(rows.mean(0), rows.amin(0), rows.amax(0))
        ]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
        picture.append((title, samples[0]))

    figure, axes = plt.subplots(2, 5, figsize=(12.5, 5.4), layout="constrained")
    for axis, (title, points) in zip(axes.flat, picture):
        axis.scatter(*points[:1000].T, s=2, alpha=0.4, linewidths=0)
        axis.scatter(*MEANS.T, s=12, marker="+", color="black", linewidths=0.8)
        axis.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
    figure.savefig(args.output, dpi=80)
    print(f"{time.time() - start:.0f} seconds, {args.seeds} seeds: mean (least to greatest); wrote {args.output}")


if __name__ == "__main__":
    main()
