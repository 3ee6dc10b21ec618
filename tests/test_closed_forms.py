"""The closed forms of SIM, DI* (score-based divergence) and DIDR (diffused reward), as in test_objectives."""

import pytest
import torch

from diff_instruct.objectives import (
    Estimates,
    denoise,
    distance_gradient,
    guide,
    ikl_gradient,
    score_gradient,
    weight,
)
from diff_instruct.terms import IKL, Alpha, Batch, ScoreDistance
from diff_instruct.training.steps import GeneratorStep
from experiments.exact import Exact
from tests.test_objectives import MU, SHAPE, D, M, S, W, both_schedules, gradient_in_a_b, schedule, x0_of_gaussian  # noqa: F401


L2 = ("l2", 1.0, "inside")
LOW, HIGH = 0.2, 0.8


def variances(t, a):
    """α, u = α² a² + σ² (generator) and v = α² S + σ² (reference), as (B,)."""
    alpha, sigma = (s.flatten() for s in schedule(t))
    return alpha, alpha**2 * a**2 + sigma**2, alpha**2 * S + sigma**2


def mean_over_t(weighting, f):
    """The mean over π(t) of w(t) f(α, v)."""
    t = schedule.timesteps(torch.linspace(0, 1, 601)[:-1], LOW, HIGH)
    alpha, _, v = variances(t, 0)
    w = weight(weighting, *schedule(t), torch.zeros(len(t), *SHAPE), torch.zeros(())).flatten()
    return (w * f(alpha, v)).mean().item()


def train(curvature, steps=400, **options):
    """(a, b) after a loop of the generator's step with an exact TA; `curvature` is that of the loss in b."""
    rng, a, b = torch.Generator().manual_seed(1), 1.2, -0.5
    for i in range(steps):
        t = schedule.timesteps(torch.rand(512, generator=rng), LOW, HIGH)
        da, db = gradient_in_a_b(a, b, t, 512, seed=i, **options)
        rate = (0.2 if i < 0.75 * steps else 0.03) / curvature
        a, b = a - rate * da, b - rate * db
    return a, b


@pytest.mark.parametrize("t", [100, 400, 900])
def test_gradient_is_that_of_the_squared_score_difference(both_schedules, t):  # noqa: F811
    """Item 4: of w' E (s_ψ^{a,b} − s_ref)² over the frozen law N(α b₀, u₀) of x_t, in (a, b) at (a₀, b₀)."""
    a0, b0 = 1.3, 0.1
    level = W * schedule(torch.tensor([t]))[1].item() ** 2  # w'(t)
    a, b = (torch.tensor(x, requires_grad=True) for x in (a0, b0))
    alpha, u, v = variances(torch.tensor([t]), a)
    u0 = u.detach()
    # s_ψ − s_ref is linear in x_t: its mean square over N(α b₀, u₀)
    mean = -alpha * (b0 - b) / u + alpha * (b0 - MU) / v
    ((mean**2 + (1 / v - 1 / u) ** 2 * u0) * level).sum().backward()
    got = gradient_in_a_b(a0, b0, t, 200_000, distance=L2)
    scale = max(level, abs(a.grad.item()), abs(b.grad.item()))
    assert got == pytest.approx((a.grad.item(), b.grad.item()), abs=0.02 * scale)


@pytest.mark.parametrize("huber_c", [0.1, 3.0])
def test_gradient_is_that_of_the_pseudo_huber_distance(both_schedules, huber_c):  # noqa: F811
    """The same for a distance that is not separable, against plain autograd in (a, b) over a frozen sample of x_t."""
    t, n = torch.full((100_000,), 400), 100_000
    a, b = (torch.tensor(x, requires_grad=True) for x in (1.3, 0.1))
    alpha, sigma = schedule(t)
    z, eps = torch.randn(2, n, *SHAPE, generator=torch.Generator().manual_seed(5))
    x_t = schedule.add_noise(1.3 * z + 0.1, eps, t)
    y = -(x_t - alpha * b) / (alpha**2 * a**2 + sigma**2) + (x_t - alpha * MU) / (alpha**2 * S + sigma**2)
    c = huber_c * D**0.5
    distance = D**0.5 * (((y**2).sum(dim=(1, 2, 3)) + c**2).sqrt() - c)
    (distance.mean() * W * alpha[0].item() / D).backward()
    got = gradient_in_a_b(1.3, 0.1, 400, n, distance=("pseudo_huber", huber_c, "inside"))
    assert got == pytest.approx((a.grad.item(), b.grad.item()), rel=0.02)


def test_detaching_the_distance_s_factor_halves_the_gradient_in_the_scale(both_schedules):  # noqa: F811
    """Why both factors must carry gradient: the mean would not show it (squared L2, one t)."""
    t, n = torch.full((100_000,), 300), 100_000
    a, b = (torch.tensor(x, requires_grad=True) for x in (1.3, 0.1))
    z, eps = torch.randn(2, n, *SHAPE, generator=torch.Generator().manual_seed(5))
    alpha, sigma = schedule(t)
    x0 = a * z + b
    x_t = schedule.add_noise(x0, eps, t)
    ta = x0_of_gaussian(x_t, 0.1, 1.3**2, alpha, sigma)
    ref = x0_of_gaussian(x_t, MU, S, alpha, sigma)
    factor = distance_gradient(alpha / sigma**2 * (ta - ref), "l2", 1.0).detach()
    (-W * factor * alpha * (ta - x0)).sum(dim=(1, 2, 3)).mean().backward()
    da, db = gradient_in_a_b(1.3, 0.1, 300, n, distance=L2)
    assert a.grad.item() / D == pytest.approx(da / 2, rel=0.03)
    assert b.grad.item() / D == pytest.approx(db, rel=0.03)


def test_pseudo_huber_with_large_c_is_squared_l2():
    y = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(2e4 * distance_gradient(y, "pseudo_huber", 1e4), distance_gradient(y, "l2", 1.0))
    with pytest.raises(ValueError, match="pseudo_huber, l2"):
        distance_gradient(y, "l1", 1.0)


@pytest.mark.parametrize("guidance, cfg_scale", [("inside", 1.0), ("inside", 3.0), ("outside", 3.0)])
def test_score_divergence_reaches_its_optimum(both_schedules, guidance, cfg_scale):  # noqa: F811
    """DI*: a*² = S; b* = μ + (α_cfg − 1)(μ − m) + α_rew k / C, C the mean of 2 w σ² α²/v²; outside, guidance moves it
    by (α_cfg − 1)(μ − m) times the mean of w α²/v, over C."""
    c = mean_over_t("x0", lambda alpha, v: 2 * (v - alpha**2 * S) * alpha**2 / v**2)
    ikl = mean_over_t("x0", lambda alpha, v: alpha**2 / v)
    k, shift = 0.1 * c, (cfg_scale - 1) * (MU - M)
    b_star = MU + (shift if guidance == "inside" else shift * ikl / c) + 4.0 * 0.1
    distance = ("l2", 1.0, guidance)
    a, b = train(c, weighting="x0", distance=distance, reward_scale=4.0, k=k, cfg_scale=cfg_scale)
    assert (a, b) == pytest.approx((S**0.5, b_star), abs=0.04)


@pytest.mark.parametrize("weighting", ["score", "x0"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_diffused_reward_reaches_the_tilted_mean_for_any_weighting(both_schedules, weighting, cfg_scale):  # noqa: F811
    """Item 5: b* = μ + α_rew k S (+ guidance), a*² = S: the mean of p_ref exp(α_rew r), whatever w(t)."""
    k, reward_scale = 0.2, 5.0
    c = mean_over_t(weighting, lambda alpha, v: alpha**2 / v)
    options = {"weighting": weighting, "reward_scale": reward_scale, "k": k, "cfg_scale": cfg_scale}
    a, b = train(c, diffused_steps=1, **options)
    b_star = MU + (cfg_scale - 1) * (MU - M) + reward_scale * k * S
    assert (a, b) == pytest.approx((S**0.5, b_star), abs=0.04)


def test_clean_reward_s_optimum_depends_on_the_weighting():
    """Item 2, for contrast: the same reward and α_rew, two weightings, two means (b* = μ + α_rew k / C)."""
    k, reward_scale, found, expected = 0.2, 5.0, [], []
    for weighting in ("score", "x0"):
        c = mean_over_t(weighting, lambda alpha, v: alpha**2 / v)
        found.append(train(c, weighting=weighting, reward_scale=reward_scale, k=k)[1])
        expected.append(MU + reward_scale * k / c)
    assert found == pytest.approx(expected, abs=0.04)
    assert abs(found[0] - found[1]) > 0.3


def test_many_denoising_steps_follow_the_probability_flow():
    """D_k of a Gaussian reference: k = 1 has slope α S / v in x_t; k → ∞ maps N(α μ, v) onto N(μ, S), slope √(S/v)."""
    t = torch.tensor([800])
    estimate = lambda x, s: x0_of_gaussian(x, MU, S, *schedule(s))  # noqa: E731
    alpha, _, v = variances(t, 0)
    x_t = alpha * MU + torch.arange(16.0).view(1, *SHAPE).requires_grad_()
    slopes = []
    for k in (1, 400):
        d_k = denoise(estimate(x_t, t), x_t, t, estimate, schedule, k)
        slopes.append(torch.autograd.grad(d_k.sum(), x_t)[0].mean().item())
    assert slopes[0] == pytest.approx((alpha * S / v).item(), rel=1e-4)
    assert slopes[1] == pytest.approx((S / v).sqrt().item(), rel=0.01)
    assert d_k[0, 0, 0, 0].item() == pytest.approx(MU, abs=1e-3)


def test_score_gradient_is_that_of_autograd_through_everything():
    """Networks that are not linear, `dmd` weights: the gradient in θ by the cut at x0 equals the uncut loss's."""
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 1))  # noqa: E731
    generator, ta, ref = make(), make().requires_grad_(False), make().requires_grad_(False)
    z, eps = torch.randn(2, 5, *SHAPE)
    t = torch.tensor([30, 200, 400, 700, 950])
    alpha, sigma = schedule(t)

    def scores(x_t):
        return ta(x_t), ref(x_t), 0.5 * ref(x_t + 1)

    for name, c, guidance in (("pseudo_huber", 0.1, "inside"), ("l2", 1.0, "inside"), ("l2", 1.0, "outside")):
        x0 = generator(z)
        x_t = schedule.add_noise(x0, eps, t)
        from_ta, cond, null = scores(x_t)
        w = weight("dmd", alpha, sigma, x0, guide(cond, null, 3.0))
        y = alpha / sigma**2 * (from_ta - (guide(cond, null, 3.0) if guidance == "inside" else cond))
        s_ta, s_noise = (alpha * from_ta - x_t) / sigma**2, -eps / sigma
        level = sigma**2 if name == "l2" else alpha
        loss = -w * level * distance_gradient(y, name, c) * (s_ta - s_noise)
        if guidance == "outside":
            loss = loss + w * 2.0 * (alpha / sigma**2 * (null - cond)).detach() * x_t
        expected = torch.autograd.grad(loss.sum(), generator.parameters())

        x0 = generator(z)
        cut = x0.detach().requires_grad_()
        from_ta, cond, null = scores(schedule.add_noise(cut, eps, t))
        parts = score_gradient(cut, Estimates(from_ta, cond, null, 3.0, w, alpha, sigma), name, c, guidance)
        got = torch.autograd.grad(x0, generator.parameters(), sum(parts))
        assert (parts[1].abs().max() > 0) == (guidance == "outside")
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


@pytest.mark.parametrize("distance", [None, ("pseudo_huber", 1e-4, "inside"), ("l2", 1.0, "inside")])
def test_the_divergence_pulls_alike_at_all_noise_levels(distance):
    """The gradient's norm with `x0`, of the integral KL and of both distances: within 1 to 5, where with
    the integral KL's own weights the pseudo-Huber distance's were as 1 to 100."""
    z, eps = torch.randn(2, 256, *SHAPE, generator=torch.Generator().manual_seed(5))
    x0, norms = 0.7 * z + 0.1, []

    def exact(mean, var):
        return lambda x_t, t: x0_of_gaussian(x_t, mean, var, *schedule(t))

    terms = (ScoreDistance(*distance) if distance else IKL(),)
    step = GeneratorStep(Exact(schedule, exact(0.1, 0.49)), Exact(schedule, exact(MU, S)), {}, terms, "x0")
    for t in (200, 400, 600, 800, 950):
        t = torch.full((256,), t)
        _, figures = step(x0, Batch(["c"] * 256, {}, z, z[:0], torch.zeros_like(t), t, eps), Alpha(1.0))
        norms.append(figures["norm_divergence"].item())
    assert max(norms) < 5 * min(norms), norms


def test_guidance_beside_the_distance_is_that_of_the_integral_kl():
    x0, ta, cond, null = torch.randn(4, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule(torch.tensor([100, 300, 500, 900]))
    w = weight("x0", alpha, sigma, x0, cond)
    scores = ta, cond, null, 4.5, w, alpha, sigma
    outside = score_gradient(x0.requires_grad_(), Estimates(*scores), "l2", 1.0, "outside")[1]
    assert torch.equal(outside, ikl_gradient(Estimates(*scores))[1])
