"""The terms of dL/dx0: each an object, made once, that names its parts of the generator's gradient.

The generator's step ([`GeneratorStep`]) noises x0 once and asks each network once; what came out is a [`Noised`]
batch, and dL/dx0 is the sum of what all terms make of it. A new term is one more class here with

- `acts(alpha)`: whether it has a part in a step with this [`Alpha`];
- `through`: the networks, "ta" and "ref", through whose estimates its gradient goes: these keep their graph;
- `gradient(noised)`: its parts by name, each (B, C, H, W); the log has the norm of each as `norm_<name>`.

A term that needs more than TA and reference, another network or pictures to stay near, is made with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from diff_instruct.objectives import (
    KAPPA,
    Estimates,
    denoise,
    diffused_reward_gradient,
    ikl_gradient,
    reward_gradient,
    score_difference,
    score_gradient,
)
from diff_instruct.rewards.asking import asking, on_all


class Alpha(NamedTuple):
    """What may change from step to step: α_cfg, 1 for no guidance; α_rew; and whether α_rew, 0 meanwhile, is being
    measured, for which ∇r is needed all the same."""

    cfg: float
    rew: float = 0.0
    measuring: bool = False


class Batch(NamedTuple):
    """What one pass draws: B prompts and their conditioning c; z, ε ~ N(0, I), (B, C, H, W); t ~ π(t), (B,).

    And for a generator of n steps: the noise of the further ones, (n − 1, B, C, H, W), and the step, (B,), whose x0
    is taken, with θ's gradient through that step alone.

    And, where they are: of pairs the `target`, what the reference makes of z, (B, C, H, W); x0 with its graph, if it
    has been made; and another (t, ε) for the same x0.
    """

    prompts: list
    c: dict
    z: torch.Tensor
    noise: torch.Tensor
    step: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    target: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    again: tuple | None = None

    def noised_again(self):
        """The same samples with the other t and ε."""
        t, eps = self.again
        return self._replace(t=t, eps=eps)


@dataclass
class Noised:
    """What a term sees: a batch of the generator's pictures, noised, and what the networks say of them.

    Args:
        x0: the leaf that dL/dx0 is of, (B, C, H, W); x_t = α_t x0 + σ_t ε depends on it.
        batch ([`Batch`]): what was drawn; x0 = g_θ(z, c).
        alpha ([`Alpha`]): of this step.
        estimates ([`Estimates`]): x̂0 of TA and reference at x_t, with w(t), α_t and σ_t.
        guided: the guided reference's x̂0, (B, C, H, W).
        ref: the guided reference: a function (x_t, t) -> x̂0.
        schedule: a function t -> (α_t, σ_t).
        figures (`dict`): scalar tensors to log; a term may add some.
    """

    x0: torch.Tensor
    x_t: torch.Tensor
    batch: Batch
    alpha: Alpha
    estimates: Estimates
    guided: torch.Tensor
    ref: Callable
    schedule: Callable
    figures: dict = field(default_factory=dict)


@dataclass(frozen=True)
class IKL:
    """The integral KL divergence (DI, DI++, DIDR): w(t) ⟨sg[s_ψ − s̃_ref], x_t⟩. Its parts: `divergence`, from the
    reference without guidance, and `cfg`, the implicit reward of guidance."""

    through = ()

    def acts(self, alpha):
        return True

    def gradient(self, noised):
        divergence, guidance = ikl_gradient(noised.estimates)
        return {"divergence": divergence} | ({"cfg": guidance} if noised.alpha.cfg != 1 else {})


@dataclass(frozen=True)
class ScoreDistance:
    """A distance of scores (SIM, DI*), y_t = s_ψ − s̃_ref: w(t) ⟨−d'(y_t), s_ψ(x_t) − ∇ log p(x_t | x0)⟩.

    Its part `divergence` has guidance inside; with `guidance="outside"` there is `cfg` beside it, as in [`IKL`]. The
    arguments are those of `score_gradient`.
    """

    distance: str = "pseudo_huber"
    huber_c: float = 0.01
    guidance: str = "inside"

    through = ("ta", "ref")

    def acts(self, alpha):
        return True

    def gradient(self, noised):
        e = noised.estimates
        divergence, guidance = score_gradient(noised.x0, e, self.distance, self.huber_c, self.guidance)
        beside = self.guidance == "outside" and noised.alpha.cfg != 1
        return {"divergence": divergence} | ({"cfg": guidance} if beside else {})


@dataclass(frozen=True)
class LatentReward:
    """r(x0, c) of latents (B, C, H, W), through the decoder, `batch_size` samples at a time (None: all at once).

    Args:
        score: a function (pixels, prompts) -> (B,), differentiable in the pixels.
        decode: a function from latents to pixels.
        accelerator: of several processes, which all end when one has no scores.
    """

    score: Callable
    decode: Callable
    batch_size: int | None = None
    accelerator: object = None

    def gradient(self, x0, prompts):
        """r, (B,), and ∇r at latents x0, (B, C, H, W): see `reward_gradient`.

        Raises:
            NoScores: on all processes, if the reward or its backward pass fails on one of them.
        """
        with on_all(self.accelerator), asking("the reward's gradient"):
            return reward_gradient(x0, prompts, self.score, self.decode, self.batch_size)


@dataclass(frozen=True)
class CleanReward:
    """−α_rew r(x0, c), the reward of the generated picture (DI++, DI*). Its part: `reward`."""

    reward: LatentReward

    through = ()

    def acts(self, alpha):
        return alpha.rew != 0 or alpha.measuring

    def gradient(self, noised):
        r, grad_r = self.reward.gradient(noised.x0, noised.batch.prompts)
        noised.figures["reward"] = r.mean()
        if noised.alpha.measuring:  # what α_rew is to scale
            noised.figures["norm_reward"] = mean_norm(grad_r)
        return {"reward": -noised.alpha.rew * grad_r}


@dataclass(frozen=True)
class DiffusedReward:
    """−α_rew r(D_k(x_t, c), c), the reward of what the guided reference makes of x_t in k steps, at every noise level
    (DIDR). Its part: `reward`. Takes gradients through the reference: not beside a [`ScoreDistance`]."""

    reward: LatentReward
    k: int = 1

    through = ("ref",)

    def acts(self, alpha):
        return alpha.rew != 0

    def gradient(self, noised):
        d_k = denoise(noised.guided, noised.x_t, noised.batch.t, noised.ref, noised.schedule, self.k)
        r, grad_r = self.reward.gradient(d_k, noised.batch.prompts)
        noised.figures["reward"] = r.mean()
        return {"reward": -noised.alpha.rew * diffused_reward_gradient(noised.x0, d_k, noised.estimates.w, grad_r)}


@dataclass(frozen=True)
class Anchor:
    """½ κ/√d · scale · ‖x0 − x0*‖², x0* what the reference makes of the same z: a pair's. Its part: `anchor`.

    In size it is as the integral KL with w(t) `x0`, which pulls by κ/√d of a difference of two x̂0. Of several steps
    only the first has an anchor, as in DP-DMD (arXiv 2602.03139): the others have noise of their own.
    """

    scale: float

    through = ()

    def acts(self, alpha):
        return self.scale > 0

    def gradient(self, noised):
        x0, batch = noised.x0.detach(), noised.batch
        first = (batch.step == 0).view(-1, 1, 1, 1)
        return {"anchor": first * (self.scale * KAPPA / x0[0].numel() ** 0.5 * (x0 - batch.target))}


@dataclass(frozen=True)
class NormGuard:
    """½ κ/√d · scale · relu(‖x̂0_ψ‖ − ‖x̃0_ref‖)², a hinge on the norm of what is predicted at x_t: as long as the
    guided reference's, but no longer. Its part: `guard`.

    NormGuard (arXiv 2606.27771) compares a network before and after RL at the inputs of its sampler. A generator of
    one step starts from noise alone, where the reference predicts a mean, whose norm is less than any picture's. So
    the TA speaks for the generator, at all noise levels. Its x̂0 stands for x0, as it does in the integral KL with
    w(t) `x0`, and in size it is as that: the part of the difference by which predictions are too long.
    """

    scale: float

    through = ()

    def acts(self, alpha):
        return self.scale > 0

    def gradient(self, noised):
        x0 = noised.estimates.ta.detach()
        norm, most = (x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (x0, noised.guided.detach()))
        excess = (norm - most).clamp(min=0)
        noised.figures["norm_excess"] = (norm / most - 1).mean()
        return {"guard": self.scale * KAPPA / x0[0].numel() ** 0.5 * excess / norm * x0}


@dataclass(frozen=True)
class SurrogateReward:
    """w(t) (s_ref − s_φ): the target score becomes s̃_ref + (s_φ − s_ref), that of p_ref exp(α_rew r) as far as φ has
    learnt it (`diff_instruct/surrogate.py`); so the optimum does not depend on w(t). Its part: `surrogate`."""

    phi: Callable  # a [`Denoiser`]

    through = ()

    def acts(self, alpha):
        return alpha.rew != 0

    @torch.no_grad()
    def gradient(self, noised):
        e, batch = noised.estimates, noised.batch
        from_phi = self.phi.x0(noised.x_t, batch.t, batch.c)
        return {"surrogate": e.w * e.alpha * score_difference(e.cond, from_phi, e.alpha, e.sigma)}


def mean_norm(gradient):
    """The norm of a gradient (B, C, H, W) per sample, averaged over the batch."""
    return gradient.flatten(1).norm(dim=1).mean()
