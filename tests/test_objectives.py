"""The closed forms of the Gaussian world, reached through the steps and terms that the script takes.

Per element p_ref(x0 | c) = N(μ, S), the generator is x0 = a z + b, both scores are exact. Latents are (B, 1, 4, 4).
"""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diff_instruct.objectives import (
    KAPPA,
    WEIGHTINGS,
    Estimates,
    denoising_loss,
    ikl_gradient,
    reward_gradient,
    weight,
)
from diff_instruct.terms import IKL, Alpha, Batch, CleanReward, DiffusedReward, LatentReward, ScoreDistance
from diff_instruct.training.steps import GeneratorStep
from experiments.exact import Exact
from pipeline_one_step import Schedule


S, MU, M = 0.6, 0.8, -0.3  # reference: variance, conditional and unconditional mean
SHAPE = (1, 4, 4)
D = 16
W = KAPPA / D**0.5  # the constant in w(t)
schedule = Schedule(DDPMScheduler(beta_schedule="linear"))


@pytest.fixture(params=["variance-preserving", "flow"])
def both_schedules(request, monkeypatch):
    """The test runs with x_t of either kind of schedule: `schedule` becomes the other, wherever it is imported."""
    if request.param == "flow":
        for name, value in vars(Schedule(FlowMatchEulerDiscreteScheduler(shift=1.0))).items():
            monkeypatch.setattr(schedule, name, value)


def x0_of_gaussian(x_t, mean, var, alpha, sigma):
    """x̂0 = E[x0 | x_t] for x0 ~ N(mean, var): Tweedie's formula with the exact score."""
    return mean + alpha * var / (alpha**2 * var + sigma**2) * (x_t - alpha * mean)


def gradient_in_a_b(
    a, b, t, n, cfg_scale=1.0, weighting="score", reward_scale=0.0, k=0.0, seed=0, distance=None, diffused_steps=0
):
    """Monte Carlo dL/d(a, b) per element (summed over the d elements, as the loss is) by one `backward` at x0.

    The generator's step of the script: the integral KL, or the score-based divergence if `distance` gives its options;
    the reward k · sum(x) of the clean image, or diffused if `diffused_steps` > 0.
    """
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.tensor(float(v), requires_grad=True) for v in (a, b))
    z, eps = torch.randn(2, n, *SHAPE, generator=rng)
    t = torch.full((n,), t) if isinstance(t, int) else t
    x0 = a * z + b

    def exact(mean, var):
        return lambda x_t, t: x0_of_gaussian(x_t, mean, var, *schedule(t))

    ta = Exact(schedule, exact(b.detach(), a.detach() ** 2))
    ref = Exact(schedule, exact(MU, S), exact(M, S))
    reward = LatentReward(lambda pixels, prompts: k * pixels.sum(dim=(1, 2, 3)), decode=lambda x: x)
    terms = (
        ScoreDistance(*distance) if distance else IKL(),
        DiffusedReward(reward, diffused_steps) if diffused_steps else CleanReward(reward),
    )
    batch = Batch(["c"] * n, {}, z, z[:0], torch.zeros_like(t), t, eps)
    dL_dx0, _ = GeneratorStep(ta, ref, {}, terms, weighting)(x0, batch, Alpha(cfg_scale, reward_scale))
    x0.backward(dL_dx0 / n)
    return a.grad.item() / D, b.grad.item() / D


@pytest.mark.parametrize("t", [50, 400, 900])
@pytest.mark.parametrize("reward_scale", [0.0, 2.0])
def test_gradient_is_that_of_reward_and_integral_kl(both_schedules, t, reward_scale):
    """Item 1: d/d(a, b) of −α_rew E r + w KL_t, with w = κ/√d (`score`)."""
    a, b, k = torch.tensor(1.3, requires_grad=True), torch.tensor(0.1, requires_grad=True), 0.05
    alpha, sigma = (s.item() for s in schedule(torch.tensor([t])))
    u, v = alpha**2 * a**2 + sigma**2, alpha**2 * S + sigma**2
    kl = 0.5 * (u / v + alpha**2 * (b - MU) ** 2 / v - 1 - torch.log(u / v))
    (kl * W - reward_scale * k * b).backward()
    got = gradient_in_a_b(1.3, 0.1, t, 200_000, reward_scale=reward_scale, k=k)
    assert got == pytest.approx((a.grad.item(), b.grad.item()), abs=W * 8e-3)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
def test_guided_gradient(both_schedules, cfg_scale):
    """Item 3: the gradient in b is w [α²(b − μ)/v + (α_cfg − 1) α² (m − μ)/v]."""
    t, b = 300, 0.1
    alpha, sigma = (s.item() for s in schedule(torch.tensor([t])))
    v = alpha**2 * S + sigma**2
    expected = alpha**2 / v * ((b - MU) + (cfg_scale - 1) * (M - MU)) * W
    assert gradient_in_a_b(1.3, b, t, 200_000, cfg_scale)[1] == pytest.approx(expected, abs=W * 8e-3)


@pytest.mark.parametrize("weighting", ["score", "eps", "x0"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_loop_reaches_the_optimum(weighting, cfg_scale):
    """Items 2 and 3: a* = √S, b* = μ + α_rew k / C + (α_cfg − 1)(μ − m), C the mean of w α² / v over π(t)."""
    rng = torch.Generator().manual_seed(1)
    low, high = 0.2, 0.8
    every_t = schedule.timesteps(torch.linspace(0, 1, 601)[:-1], low, high)
    alpha, sigma = schedule(every_t)
    w = weight(weighting, alpha, sigma, torch.zeros(len(every_t), *SHAPE), torch.zeros(()))
    c = (w * alpha**2 / (alpha**2 * S + sigma**2)).mean().item()
    k, reward_scale = 0.1 * c, 4.0
    b_star = MU + reward_scale * k / c + (cfg_scale - 1) * (MU - M)
    a, b = 1.2, -0.5
    for i in range(400):
        t = schedule.timesteps(torch.rand(512, generator=rng), low, high)
        da, db = gradient_in_a_b(a, b, t, 512, cfg_scale, weighting, reward_scale, k, seed=i)
        rate = (0.2 if i < 300 else 0.03) / c
        a, b = a - rate * da, b - rate * db
    assert b == pytest.approx(b_star, abs=0.04)
    assert a == pytest.approx(S**0.5, abs=0.04)


def test_dmd_weighting_normalises_each_sample():
    """The `dmd` gradient is x̂0_ψ − x̃0_ref over its own scale: the same for a sample and for ten times the sample."""
    x = torch.randn(3, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 400, 800, 900])
    alpha, sigma = schedule(t)
    norms = []
    for scale in (1.0, 10.0):
        x0, ta, ref = scale * x
        w = weight("dmd", alpha, sigma, x0, ref)
        gradient, _ = ikl_gradient(Estimates(ta, ref, ref, 1.0, w, alpha, sigma))
        torch.testing.assert_close(gradient, (ta - ref) / (x0 - ref).abs().mean(dim=(1, 2, 3), keepdim=True) * W)
        norms.append(gradient)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_meet_their_definition(both_schedules, weighting):
    """The table of weightings: what multiplies x̂0_ψ − x̃0_ref, over κ/√d."""
    x0, ta, ref = torch.randn(3, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 300, 700, 980])
    alpha, sigma = schedule(t)
    w = weight(weighting, alpha, sigma, x0, ref)
    gradient = ikl_gradient(Estimates(ta, ref, ref, 1.0, w, alpha, sigma))[0] / W
    scale = {
        "score": (alpha / sigma) ** 2,
        "eps": alpha / sigma,
        "x0": torch.ones(()),
        "dmd": 1 / ((x0 - ref).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6),
    }[weighting]
    torch.testing.assert_close(gradient, scale * (ta - ref), rtol=1e-4, atol=1e-6)


def test_gradient_norm_does_not_depend_on_latent_size():
    """The inner product is a sum over elements and w carries κ/√d: more elements, the same norm per sample."""
    alpha, sigma = schedule(torch.full((64,), 400))
    norms = []
    for shape in ((1, 4, 4), (4, 32, 32)):
        x0, ta, ref = torch.randn(3, 64, *shape, generator=torch.Generator().manual_seed(0))
        gradient, _ = ikl_gradient(Estimates(ta, ref, ref, 1.0, weight("dmd", alpha, sigma, x0, ref), alpha, sigma))
        norms.append(gradient.flatten(1).norm(dim=1).mean().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_denoising_loss_is_least_at_the_exact_score(both_schedules):
    """λ = σ²: the loss of the exact ε̂ is smaller than that of any scaled one."""
    rng = torch.Generator().manual_seed(0)
    t = torch.full((20_000,), 500)
    eps, z = torch.randn(2, 20_000, *SHAPE, generator=rng)
    x0 = 1.3 * z + 0.1
    alpha, sigma = schedule(t)
    x_t = schedule.add_noise(x0, eps, t)
    exact = (x_t - alpha * x0_of_gaussian(x_t, 0.1, 1.3**2, alpha, sigma)) / sigma
    losses = [denoising_loss(f * exact, eps).item() for f in (0.95, 1.0, 1.05)]
    assert losses[1] == min(losses)


def test_reward_gradient_does_not_depend_on_the_micro_batch():
    """Through a decoder and a reward that are not linear; the gradient is per sample, not a mean."""
    x0 = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    reward = lambda pixels, prompts: torch.tensor([len(p) for p in prompts]) * pixels.sin().sum(dim=(1, 2, 3))  # noqa: E731
    prompts = ["a", "bb", "ccc", "dd", "e"]
    whole = reward_gradient(x0, prompts, reward, torch.tanh, 5)
    for size in (1, 2, 4):
        for got, expected in zip(reward_gradient(x0, prompts, reward, torch.tanh, size), whole):
            torch.testing.assert_close(got, expected)
    x = x0[1].clone().requires_grad_()
    (2 * torch.tanh(x).sin().sum()).backward()
    torch.testing.assert_close(whole[1][1], x.grad)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_conversions_recover_x0_and_epsilon(prediction_type):
    """Each prediction type, from exact outputs, gives back x0 and ε."""
    s = Schedule(DDPMScheduler(beta_schedule="linear", prediction_type=prediction_type))
    x0, eps = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 500, 979])
    alpha, sigma = s(t)
    x_t = s.add_noise(x0, eps, t)
    output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction_type]
    torch.testing.assert_close(s.x0(output, x_t, t), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(s.epsilon(output, x_t, t), eps, atol=1e-4, rtol=1e-4)


def test_the_loss_of_v_prediction_is_plain_in_v():
    """Of weights 1 the one of ‖ε̂ − ε‖² would be α² times it, 0.0003 of it at t = 900."""
    s = Schedule(DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction"))
    x0, eps, v = torch.randn(3, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in (20, 500, 900):
        t = torch.full((3,), t)
        alpha, sigma = s(t)
        loss = denoising_loss(s.epsilon(v, s.add_noise(x0, eps, t), t), eps, s.loss_weight(t))
        torch.testing.assert_close(loss, (v - (alpha * eps - sigma * x0)).square().mean(), rtol=1e-3, atol=0)


def test_timesteps_include_both_ends():
    t = schedule.timesteps(torch.linspace(0, 1, 10_001)[:-1], 0.02, 0.98)
    assert t.min() == 20 and t.max() == 980
    assert schedule.timesteps(torch.tensor([0.0, 0.9999]), 0.0, 1.0).tolist() == [0, 999]


def test_flow_outputs_give_x0_and_epsilon_and_pi_has_no_ends():
    s = Schedule(FlowMatchEulerDiscreteScheduler(shift=1.0))
    x0, eps = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 500, 1000])
    alpha, sigma = s(t)
    assert torch.equal(alpha.flatten(), 1 - t / 1000) and torch.equal(sigma.flatten(), t / 1000)
    x_t = s.add_noise(x0, eps, t)
    torch.testing.assert_close(s.x0(eps - x0, x_t, t), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(s.epsilon(eps - x0, x_t, t), eps, atol=1e-5, rtol=1e-5)
    t = s.timesteps(torch.tensor([0.0, 0.9999]), 0.0, 1.0)
    assert t.tolist() == [1, 999]
    v = torch.randn_like(x0[:2])
    x_t = s.add_noise(x0[:2], eps[:2], t)
    loss = denoising_loss(s.epsilon(v, x_t, t), eps[:2], s.loss_weight(t))
    torch.testing.assert_close(loss, (v - (eps - x0)[:2]).square().mean(), rtol=1e-3, atol=0)
