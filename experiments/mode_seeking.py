"""Where is the KL mode seeking, and the score divergence not? `python experiments/mode_seeking.py`

The reference is two Gaussians in the plane, 0.6 on the left and 0.4 on the right, with its exact noised score. The
generator x0 = z A + b draws one Gaussian, whose noised score is exact, too: it stands for a perfect teaching
assistant. It starts narrow, between the modes. Both divergences go through the step and terms that
training takes, at three ranges of noise levels π(t). Draws `experiments/mode_seeking.png` and prints the table.
"""

from pathlib import Path

import matplotlib
import torch
from diffusers import DDPMScheduler
from tqdm.auto import tqdm


matplotlib.use("Agg")

from exact import Exact
from matplotlib import pyplot as plt

from diff_instruct.terms import IKL, Alpha, Batch, ScoreDistance
from diff_instruct.training.steps import GeneratorStep
from pipeline_one_step import Schedule


MEANS, SHARES, STD = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.6, 0.4]), 0.25
START_STD, START_MEAN = 0.3, (-0.1, 0.0)
STEPS, BATCH, LEARNING_RATE = 1500, 512, 1e-2
RANGES = [(0.0, 0.03), (0.0, 0.1), (0.02, 0.98)]  # of π(t), in fractions of the schedule; the last is the script's
DIVERGENCES = {"IKL (DI)": IKL(), "score (SIM)": ScoreDistance()}
schedule = Schedule(DDPMScheduler(beta_schedule="linear"))


def latents(x):
    """(n, 2) to the (B, C, H, W) of the objectives."""
    return x.reshape(-1, 2, 1, 1)


def x0_ref(x_t, t):
    """E[x0 | x_t] of the mixture: each mode's posterior mean, weighed by the mode's posterior."""
    alpha, sigma = (s.flatten(1) for s in schedule(t))
    v = alpha**2 * STD**2 + sigma**2
    off = x_t.flatten(1)[:, None] - alpha[:, None] * MEANS
    posterior = (SHARES.log() - (off**2).sum(dim=2) / (2 * v)).softmax(dim=1)
    of_mode = MEANS + (alpha * STD**2 / v)[:, None] * off
    return latents((posterior[:, :, None] * of_mode).sum(dim=1))


def x0_gaussian(x_t, t, mean, covariance):
    """E[x0 | x_t] where x0 is Gaussian."""
    alpha, sigma = schedule(t)
    noised = alpha.flatten(1)[:, :, None] ** 2 * covariance + sigma.flatten(1)[:, :, None] ** 2 * torch.eye(2)
    off = x_t.flatten(1) - alpha.flatten(1) * mean
    return latents(
        mean + (alpha.flatten(1)[:, :, None] * covariance @ torch.linalg.solve(noised, off[:, :, None]))[..., 0]
    )


def train(divergence, levels):
    """Mean (2,) and covariance (2, 2) of the trained generator."""
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(START_STD * torch.eye(2)), torch.nn.Parameter(torch.tensor(START_MEAN))
    optimizer = torch.optim.Adam([a, b], lr=LEARNING_RATE, betas=(0.0, 0.999))
    ta = Exact(schedule, lambda x_t, t: x0_gaussian(x_t, t, b.detach(), (a.T @ a).detach()))
    gradient_at_x0 = GeneratorStep(ta, Exact(schedule, x0_ref), {}, (divergence,), weighting="eps")
    for step in tqdm(range(STEPS), desc=f"{divergence} {levels}", leave=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - step / STEPS))
        z, eps = torch.randn(2, BATCH, 2)
        t = schedule.timesteps(torch.rand(BATCH), *levels)
        x0 = latents(z @ a + b)
        batch = Batch([""] * BATCH, {}, latents(z), z[:0], torch.zeros_like(t), t, latents(eps))
        dL_dx0, _ = gradient_at_x0(x0, batch, Alpha(cfg=1.0))
        optimizer.zero_grad()
        x0.backward(dL_dx0 / BATCH)
        optimizer.step()
    return b.detach(), (a.T @ a).detach()


def main():
    torch.set_num_threads(1)
    spread = (SHARES @ MEANS[:, 0] ** 2 - (SHARES @ MEANS[:, 0]) ** 2 + STD**2).sqrt()
    print(f"reference: mean {SHARES @ MEANS[:, 0]:.2f}, spread {spread:.2f}; one mode has {STD}")
    print("| noise levels | divergence | mean | spread |\n|---|---|---|---|")
    axis = torch.linspace(-2.4, 2.4, 200)
    grid = torch.stack(torch.meshgrid(axis, axis[50:150], indexing="xy"), dim=-1)
    density = (SHARES * (-((grid[..., None, :] - MEANS) ** 2).sum(-1) / (2 * STD**2)).exp()).sum(-1)
    figure, axes = plt.subplots(2, len(RANGES), figsize=(11, 4), layout="constrained", sharex=True, sharey=True)
    for column, levels in zip(axes.T, RANGES):
        for panel, (name, divergence) in zip(column, DIVERGENCES.items()):
            mean, covariance = train(divergence, levels)
            print(
                f"| {levels[0]} to {levels[1]} | {name} | {mean[0]:.2f} | {covariance[0, 0].sqrt():.2f} |", flush=True
            )
            points = torch.randn(800, 2) @ torch.linalg.cholesky(covariance).T + mean
            panel.contour(axis, axis[50:150], density, levels=4, colors="black", linewidths=0.7)
            panel.scatter(*points.T, s=3, alpha=0.5, linewidths=0)
            panel.set(
                title=f"{name}, t in {levels[0]} to {levels[1]}", aspect="equal", xlim=(-2.4, 2.4), ylim=(-1.2, 1.2)
            )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
