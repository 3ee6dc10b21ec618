"""Which λ(t) the TA's loss should have in flow matching and for v-prediction: its error at each noise level after
equal training.

A small network learns the scores of a known mixture in two dimensions, as the TA does of the generator's images:
x_t = α x0 + σ ε, t uniform. Output is what the families' networks predict: the flow ε − x0 (α = 1 − σ, σ = t/T), or
v = α ε − σ x0 (the pocket's schedule); the loss is λ ‖ε̂ − ε‖². The exact x̂0 = E[x0 | x_t] is known, so the error is
measured against it.

    OMP_NUM_THREADS=1 python experiments/ta_loss_weight.py

prints the table of `experiments/ta_loss_weight.md`.
"""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diff_instruct.objectives import denoising_loss
from pipeline_one_step import Schedule


WEIGHTS = {
    "ε loss, λ = 1": lambda alpha, sigma: torch.ones_like(alpha),
    "v loss, λ = 1/α²": lambda alpha, sigma: 1 / alpha**2,
    "x0 loss, λ = σ²/α²": lambda alpha, sigma: sigma**2 / alpha**2,
}
SCHEDULES = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=1.0),
    "v_prediction": DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction"),
}
BANDS = {
    "flow": (20, 200, 500, 800, 950, 999),
    "v_prediction": (20, 200, 500, 700, 900, 980),
}
CENTRES = torch.tensor([[1.2, 0.4], [-0.8, 1.0], [0.1, -1.1]])
SPREAD, STEPS, BATCH, RATE, SEEDS = 0.15, 2000, 128, 2e-3, 3


def images(n, rng):
    """x0, (n, 2), of the mixture."""
    return CENTRES[torch.randint(3, (n,), generator=rng)] + SPREAD * torch.randn(n, 2, generator=rng)


def exact(x, alpha, sigma):
    """E[x0 | x_t], (n, 2), of x_t (n, 2)."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    difference = x[:, None] - alpha[:, None] * CENTRES
    p = (-(difference**2).sum(-1) / (2 * variance)).softmax(dim=1)
    means = CENTRES + (alpha * SPREAD**2 / variance)[:, None] * difference
    return (p[..., None] * means).sum(1)


def estimate(network, x, t, schedule):
    """x̂0, (n, 2), of x_t (n, 2) at t (n,)."""
    output = network(torch.cat([x, 2 * t[:, None] / schedule.steps - 1], dim=1))
    return schedule.x0(output[..., None, None], x[..., None, None], t)[..., 0, 0]


def train(weight, schedule, seed, shift, high):
    """A network after `STEPS` steps of Adam at a falling rate; first it learns a displaced mixture, as the TA starts
    as a reference and must follow the generator."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    layers = torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
    network = torch.nn.Sequential(*layers)
    for steps, displaced in ((STEPS, shift), (STEPS // 4, 0.0)):
        optimizer = torch.optim.Adam(network.parameters(), RATE, betas=(0.0, 0.999))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            x0, eps = images(BATCH, rng) + displaced, torch.randn(BATCH, 2, generator=rng)
            t = schedule.timesteps(torch.rand(BATCH, generator=rng), 0.02, high)
            alpha, sigma = (v.view(-1, 1) for v in schedule(t))
            x = alpha * x0 + sigma * eps
            optimizer.zero_grad()
            x0_hat = estimate(network, x, t, schedule)
            denoising_loss((x - alpha * x0_hat) / sigma, eps, weight(alpha, sigma)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return network


@torch.no_grad()
def errors(network, schedule, bands, n=20_000):
    """Root mean square error of x̂0 in each band of t."""
    rng, result = torch.Generator().manual_seed(99), []
    for low, high in zip(bands, bands[1:]):
        t = torch.randint(low, high, (n,), generator=rng)
        alpha, sigma = (v.view(-1, 1) for v in schedule(t))
        x = alpha * images(n, rng) + sigma * torch.randn(n, 2, generator=rng)
        result.append((estimate(network, x, t, schedule) - exact(x, alpha, sigma)).square().mean().sqrt())
    return torch.stack(result)


def main():
    for kind, scheduler in SCHEDULES.items():
        schedule, bands = Schedule(scheduler), BANDS[kind]
        print(f"| {kind}: RMS error of x̂0 | " + " | ".join(f"t {a}–{b}" for a, b in zip(bands, bands[1:])) + " |")
        print("|---" * len(bands) + "|")
        for name, weight in WEIGHTS.items():
            trained = [train(weight, schedule, seed, 0.5, bands[-1] / schedule.steps) for seed in range(SEEDS)]
            runs = torch.stack([errors(network, schedule, bands) for network in trained])
            cells = (f"{m:.3f} ± {s:.3f}" for m, s in zip(runs.mean(0), runs.std(0)))
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
