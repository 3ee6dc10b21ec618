"""The formulas of Diff-Instruct++ (arXiv 2410.18881): pure tensors in, tensors out.

Scores enter through the estimates x̂0 of the clean latents, s = (α x̂0 − x_t) / σ² (Tweedie), so that a difference of
two scores at the same x_t is (α / σ²) times the difference of two x̂0: no cancellation of large numbers.
Latents are (B, C, H, W), d = C·H·W; α_t and σ_t are (B, 1, 1, 1); everything is float32.
"""

import torch


KAPPA = 10.0
WEIGHTINGS = ("dmd", "x0", "eps", "score")


def denoising_loss(eps_hat, eps):
    """λ(t) ‖s_ψ(x_t, t, c) − ∇ log p(x_t | x0)‖² with λ = σ², that is ‖ε̂_ψ − ε‖²; the mean over elements."""
    return ((eps_hat - eps) ** 2).mean()


def guide(x0_cond, x0_uncond, cfg_scale):
    """Classifier-free guidance, ∅ + α_cfg (c − ∅): α_cfg = 1 means none. Linear, so it guides x̂0, ε̂ and s alike."""
    return x0_uncond + cfg_scale * (x0_cond - x0_uncond)


def weight(weighting, alpha, sigma, x0, x0_ref):
    """w(t), (B, 1, 1, 1), of the integral KL divergence; x̃0_ref is the guided reference's estimate.

    `score`: 1; `eps`: σ/α; `x0`: σ²/α²; `dmd`: σ²/α² over the mean of abs(x0 − x̃0_ref) of the sample (as in DMD).
    All are multiplied by κ/√d, κ = 10: the `dmd` gradient of a sample then has a norm near 10 at any latent size, so
    that α_rew = 10 weighs a reward of unit spread about as much as the divergence, and α_rew = 1 a tenth of it
    (measured on the pocket reference: a norm of ∇r of about 0.5, see README).

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


def score_difference(x0_a, x0_b, alpha, sigma):
    """s_a − s_b at the same x_t = (α / σ²)(x̂0_a − x̂0_b), (B, C, H, W)."""
    return alpha / sigma**2 * (x0_a - x0_b)


def ikl_gradient(x0_ta, x0_cond, x0_uncond, cfg_scale, w, alpha, sigma):
    """∂x_t/∂x0 · w(t) (s_ψ − s̃_ref), the gradient of the integral KL at x0, in its two parts, each (B, C, H, W).

    Returns:
        `α w (s_ψ − s_ref(c))`, the divergence from the unguided reference, and
        `−α w (α_cfg − 1)(s_ref(c) − s_ref(∅))`, the implicit reward of classifier-free guidance.
        Their sum is the gradient.
    """
    divergence = score_difference(x0_ta, x0_cond, alpha, sigma)
    guidance = (cfg_scale - 1) * score_difference(x0_uncond, x0_cond, alpha, sigma)
    return w * alpha * divergence, w * alpha * guidance


def reward_gradient(x0, prompts, reward, decode, batch_size):
    """r(x0, c) of every sample, (B,), and ∇_{x0} r, (B, C, H, W), through the decoder, `batch_size` samples at a time.

    The decoder's graph of one micro-batch is freed before the next: the result does not depend on `batch_size`.
    """
    rewards, gradients = [], []
    for i in range(0, len(x0), batch_size):
        part = x0[i : i + batch_size].detach().requires_grad_()
        r = reward(decode(part), prompts[i : i + batch_size])
        gradients.append(torch.autograd.grad(r.sum(), part)[0])
        rewards.append(r.detach())
    return torch.cat(rewards), torch.cat(gradients)
