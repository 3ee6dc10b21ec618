"""The formulas of the Diff-Instruct family: pure tensors and functions in, tensors out.

| method | source | θ-step: dL/dx0 = |
|---|---|---|
| DI | arXiv 2305.18455 | `ikl_gradient` |
| DI++ | arXiv 2410.18881 | `ikl_gradient` − α_rew `reward_gradient` |
| SIM | arXiv 2410.16794 | `score_gradient` |
| DI* | arXiv 2410.20898 | `score_gradient` − α_rew `reward_gradient` |
| DIDR | arXiv 2605.24001 | `ikl_gradient` − α_rew `diffused_reward_gradient` |

The terms of the θ-step that are made of these are objects, in `diff_instruct/terms.py`.

Scores enter through the estimates x̂0 of the clean latents, s = (α x̂0 − x_t) / σ² (Tweedie), so that a difference of
two scores at the same x_t is (α / σ²) times the difference of two x̂0: no cancellation of large numbers.
Latents are (B, C, H, W), d = C·H·W; α_t and σ_t are (B, 1, 1, 1); everything is float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


KAPPA = 10.0
WEIGHTINGS = ("dmd", "x0", "eps", "score")
DISTANCES = ("pseudo_huber", "l2")


class Estimates(NamedTuple):
    """What scores are made of at (x_t, t): x̂0 of the TA and of the reference for c and for ∅, (B, C, H, W) each;
    α_cfg; w(t), α_t and σ_t, (B, 1, 1, 1) each."""

    ta: Tensor
    cond: Tensor
    uncond: Tensor
    cfg_scale: float
    w: Tensor
    alpha: Tensor
    sigma: Tensor


class Guided(NamedTuple):
    """The reference's estimates x̂0, each (B, C, H, W): of c, of ∅, and guided, ∅ + α_cfg (c − ∅)."""

    cond: Tensor
    uncond: Tensor
    guided: Tensor


def denoising_loss(eps_hat: Tensor, eps: Tensor, loss_weight: Tensor | float = 1.0) -> Tensor:
    """λ(t) ‖s_ψ(x_t, t, c) − ∇ log p(x_t | x0)‖², that is λ'(t) ‖ε̂_ψ − ε‖² with λ' = λ/σ²; the mean over elements.

    `loss_weight` is λ'(t), (B, 1, 1, 1): 1 makes λ = σ².
    """
    return (loss_weight * (eps_hat - eps) ** 2).mean()


def guide(x0_cond: Tensor, x0_uncond: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance, ∅ + α_cfg (c − ∅): α_cfg = 1 means none. Linear, so it guides x̂0, ε̂ and s alike."""
    return x0_uncond + cfg_scale * (x0_cond - x0_uncond)


def weight(weighting: str, alpha: Tensor, sigma: Tensor, x0: Tensor, x0_ref: Tensor) -> Tensor:
    """w(t), (B, 1, 1, 1), of the integral KL divergence; x̃0_ref is the guided reference's estimate.

    `score`: 1; `eps`: σ/α; `x0`: σ²/α²; `dmd`: σ²/α² over the mean of abs(x0 − x̃0_ref) of the sample (as in DMD).
    All are multiplied by κ/√d, κ = 10: the `dmd` gradient of a sample then has a norm near 10 at any latent size, so
    that α_rew = 10 weighs a reward of unit spread about as much as the divergence, and α_rew = 1 a tenth of it
    (measured on the pocket reference: a norm of ∇r of 0.3 to 0.7).

    Raises:
        ValueError: for an unknown weighting.
    """
    d = x0[0].numel()
    if weighting == "score":
        w = torch.ones_like(alpha)
    elif weighting == "eps":
        w = sigma / alpha
    elif weighting == "x0":
        w = (sigma / alpha) ** 2
    elif weighting == "dmd":
        w = (sigma / alpha) ** 2 / ((x0 - x0_ref).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)
    else:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, but is {weighting}")
    return w.detach() * KAPPA / d**0.5


def score_difference(x0_a: Tensor, x0_b: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """s_a − s_b at the same x_t = (α / σ²)(x̂0_a − x̂0_b), (B, C, H, W)."""
    return alpha / sigma**2 * (x0_a - x0_b)


def ikl_gradient(e: Estimates) -> tuple[Tensor, Tensor]:
    """∂x_t/∂x0 · w(t) (s_ψ − s̃_ref), the gradient of the integral KL at x0, in its two parts, each (B, C, H, W).

    Args:
        e ([`Estimates`]).

    Returns:
        `α w (s_ψ − s_ref(c))`, the divergence from the unguided reference, and
        `−α w (α_cfg − 1)(s_ref(c) − s_ref(∅))`, the implicit reward of classifier-free guidance.
        Their sum is the gradient.
    """
    divergence = score_difference(e.ta, e.cond, e.alpha, e.sigma)
    guidance = (e.cfg_scale - 1) * score_difference(e.uncond, e.cond, e.alpha, e.sigma)
    return (e.w * e.alpha * divergence).detach(), (e.w * e.alpha * guidance).detach()


def distance_gradient(y: Tensor, distance: str, huber_c: float) -> Tensor:
    """d'(y), (B, C, H, W), of a distance d of each sample's difference of scores y (SIM, DI*).

    `pseudo_huber`: d(y) = √d (sqrt(‖y‖² + c²) − c) with c = `huber_c` √d, which makes d'(y) =
    y / sqrt(mean(y²) + huber_c²), with elements near 1 at any latent size. It is the papers' distance times √d, a
    factor that may be seen as a part of w(t).
    `l2`: d(y) = ‖y‖², d'(y) = 2 y; `huber_c` has no effect.

    Raises:
        ValueError: for an unknown distance.
    """
    if distance == "pseudo_huber":
        return y / ((y**2).mean(dim=(1, 2, 3), keepdim=True) + huber_c**2).sqrt()
    if distance == "l2":
        return 2 * y
    raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, but is {distance}")


def score_gradient(
    x0: Tensor, e: Estimates, distance: str = "pseudo_huber", huber_c: float = 0.01, guidance: str = "inside"
) -> tuple[Tensor, Tensor]:
    """The gradient at x0 of the score-based divergence w'(t) E d(y_t), y_t = s_ψ(x_t) − s̃_ref(x_t) (SIM, DI*).

    It is that of w'(t) ⟨−d'(y_t), s_ψ(x_t) − ∇ log p(x_t | x0)⟩, where x_t = α x0 + σ ε carries gradient through both
    factors, so through both networks. ∇ log p(x_t | x0) = (α x0 − x_t) / σ² is a score with x̂0 = x0, hence a plain
    difference of two.

    w'(t) is w(t), as in `weight`, times α for the pseudo-Huber distance and σ² for `l2`: then a weighting means here
    what it means in the integral KL, whose gradient has α · α/σ² of a difference of x̂0 where this one has α/σ² alone,
    or its square.

    Args:
        x0: a leaf that requires gradient.
        e ([`Estimates`]): computed from it with gradient enabled, the networks' parameters frozen.
        guidance: "inside" y_t, as DI* finds best; or "outside": y_t has the unguided reference, and the implicit
            reward of classifier-free guidance is added as in `ikl_gradient`.

    Returns:
        The gradient of the divergence, and that of guidance where it is outside (else zeros), each (B, C, H, W).
    """
    target, outside = guide(e.cond, e.uncond, e.cfg_scale), torch.zeros_like(x0)
    if guidance == "outside":
        target, outside = e.cond, ikl_gradient(e)[1]
    y = score_difference(e.ta, target, e.alpha, e.sigma)
    w = e.w * (e.sigma**2 if distance == "l2" else e.alpha)
    loss = -w * distance_gradient(y, distance, huber_c) * score_difference(e.ta, x0, e.alpha, e.sigma)
    return torch.autograd.grad(loss.sum(), x0)[0], outside


def denoise(x0_ref: Tensor, x_t: Tensor, t: Tensor, estimate: Callable, schedule: Callable, steps: int) -> Tensor:
    """D_k(x_t, c), (B, C, H, W): k = `steps` deterministic (DDIM, η = 0) steps from t to clean latents.

    Args:
        x0_ref: the first estimate, x̂0 at (x_t, t); k = 1 is this posterior mean itself.
        estimate: the function (x_t, t) -> x̂0 that makes the later ones, at t (k − 1)/k, ..., t/k.
        schedule: the function t -> (α_t, σ_t).
    """
    x0, now = x0_ref, t
    for i in range(1, steps):
        alpha, sigma = schedule(now)
        eps_hat = (x_t - alpha * x0) / sigma
        now = t * (steps - i) // steps
        alpha, sigma = schedule(now)
        x_t = alpha * x0 + sigma * eps_hat
        x0 = estimate(x_t, now)
    return x0


def reward_gradient(
    x0: Tensor, prompts: list[str], reward: Callable, decode: Callable, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """r(x0, c) of every sample, (B,), and ∇_{x0} r, (B, C, H, W), through the decoder, `batch_size` samples at a time
    (None: all at once).

    The decoder's graph of one micro-batch is freed before the next: the result does not depend on `batch_size`.
    """
    rewards, gradients, batch_size = [], [], batch_size or len(x0)
    for i in range(0, len(x0), batch_size):
        part = x0[i : i + batch_size].detach().requires_grad_()
        r = reward(decode(part), prompts[i : i + batch_size])
        gradients.append(torch.autograd.grad(r.sum(), part)[0])
        rewards.append(r.detach())
    return torch.cat(rewards), torch.cat(gradients)


def diffused_reward_gradient(x0: Tensor, denoised: Tensor, w: Tensor, gradient: Tensor) -> Tensor:
    """w(t) α ∇_{x_t} r(D_k(x_t, c), c), (B, C, H, W) (DIDR, arXiv 2605.24001).

    α_rew times it is w α s_r: the target score becomes s̃_ref + s_r, that of p_ref(x0 | c) exp(α_rew r(x0, c)). So
    α_rew is the exponent of the tilt, in nats per unit of reward. Unlike the gradient of the clean image's reward it
    is multiplied by w(t), κ/√d included, so that the optimum depends on neither w(t) nor κ nor d.

    Args:
        x0: the leaf from which `denoised`, D_k(x_t, c), has been computed; w as in `weight`.
        gradient: ∇r at `denoised`, as `reward_gradient` gives it.
    """
    return w * torch.autograd.grad(denoised, x0, gradient)[0]
