"""`--norm_guard`: its gradient, that it is nothing where it is off, and where it ends in the Gaussian world."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diff_instruct.objectives import KAPPA
from diff_instruct.terms import IKL, Alpha, Batch, NormGuard
from diff_instruct.training.steps import GeneratorStep
from experiments.exact import Exact
from pipeline_one_step import Schedule
from tests.runs import history, run


def test_it_is_the_gradient_of_half_the_square_of_the_excess():
    """In x̂0_ψ; 0 where the prediction is shorter than the guided reference's."""
    ta, guided = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    ta[:2] *= 2
    ta[3] *= 0.1
    ta.requires_grad_()
    noised = SimpleNamespace(estimates=SimpleNamespace(ta=ta), guided=guided, figures={})
    part = NormGuard(3.0).gradient(noised)["guard"]
    long, most = ta.flatten(1).norm(dim=1), guided.flatten(1).norm(dim=1)
    penalty = 3.0 * KAPPA / 18**0.5 * 0.5 * (long - most).clamp(min=0).square()
    torch.testing.assert_close(part, torch.autograd.grad(penalty.sum(), ta)[0])
    assert not part.requires_grad and part[:2].abs().sum() > 0 and part[3].abs().sum() == 0
    assert noised.figures["norm_excess"] == pytest.approx((long / most - 1).mean().item())
    assert NormGuard(3.0).acts(Alpha(1.0)) and not NormGuard(0.0).acts(Alpha(1.0))


@pytest.mark.parametrize("start, ends", [(1.6, 0.6**0.5), (0.5, 0.5)])
def test_alone_it_shortens_to_the_reference_s_spread_and_no_further(start, ends):
    """x0 ~ N(0, a²) against N(0, S), both denoisers exact: the hinge acts as long as a² > S = 0.6."""
    schedule, rng = Schedule(DDPMScheduler(beta_schedule="linear")), torch.Generator().manual_seed(0)

    def denoiser(variance):
        def x0(x_t, t):
            alpha, sigma = schedule(t)
            return alpha * variance / (alpha**2 * variance + sigma**2) * x_t

        return Exact(schedule, x0)

    a = start
    for _ in range(200):
        z, eps = torch.randn(2, 256, 1, 4, 4, generator=rng)
        t = schedule.timesteps(torch.rand(256, generator=rng), 0.02, 0.6)
        step = GeneratorStep(denoiser(a**2), denoiser(0.6), {}, (NormGuard(1.0),))
        batch = Batch(["c"] * 256, {}, z, z[:0], torch.zeros_like(t), t, eps)
        gradient, figures = step(a * z, batch, Alpha(1.0))
        a -= 0.05 * (gradient * z).mean().item()
    assert a == pytest.approx(ends, abs=0.02)
    assert ("norm_guard" in figures) and (figures["norm_guard"] == 0) == (start < ends + 1e-6)


def test_off_it_is_as_if_it_were_not_there():
    schedule = Schedule(DDPMScheduler(beta_schedule="linear"))
    networks = [Exact(schedule, lambda x, t, k=k: k * x) for k in (0.9, 0.7)]
    x0, eps = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 300, 600, 900])
    batch = Batch(["c"] * 4, {}, x0, x0[:0], torch.zeros_like(t), t, eps)
    steps = [
        GeneratorStep(*networks, {}, terms)(x0, batch, Alpha(1.0)) for terms in ((IKL(),), (IKL(), NormGuard(0.0)))
    ]
    assert torch.equal(steps[0][0], steps[1][0]) and steps[0][1].keys() == steps[1][1].keys()


def test_a_run_logs_it(tiny_args, tmp_path):
    run([*tiny_args, "--max_train_steps", 1, "--norm_guard", 5, "--output_dir", tmp_path / "run"])
    (row,) = [row for row in history(tmp_path / "run") if "norm_guard" in row]
    assert row["norm_guard"] >= 0 and "norm_excess" in row
