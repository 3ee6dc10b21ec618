"""The two steps of Algorithm 1, as script, memory plan, tests and experiments take them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diff_instruct.objectives import Estimates, weight
from diff_instruct.terms import (
    IKL,
    Anchor,
    CleanReward,
    DiffusedReward,
    LatentReward,
    Noised,
    NormGuard,
    ScoreDistance,
    SurrogateReward,
    mean_norm,
)


def generated(batch, generator):
    """x0 = g_θ(z, c), (B, C, H, W), of a [`Batch`], unless it has been made before."""
    return generator.generate(batch.z, batch.c, batch.noise, batch.step) if batch.x0 is None else batch.x0


def ta_loss(batch, generator, ta):
    """λ(t) ‖s_ψ(x_t, t, c) − ∇ log p(x_t | x0)‖², x0 = g_θ(z, c): gradient for ψ alone."""
    with torch.no_grad():
        x0 = generated(batch, generator).detach()
    x_t = ta.schedule.add_noise(x0, batch.eps, batch.t)
    return ta.loss(x_t, batch.eps, batch.t, batch.c)


@dataclass(frozen=True)
class GeneratorStep:
    """dL/dx0 at x0 = g_θ(z, c), the sum of its terms: of −α_rew r(x0, c) + w(t) ⟨sg[s_ψ − s̃_ref], x_t⟩ for DI++.

    Args:
        ta, ref ([`Denoiser`]): s_ψ and s_ref. Of s_ψ its `x0(x_t, t, c)` and `schedule` are used, of s_ref `guided`;
            tests and experiments give exact ones.
        null (`dict`): the conditioning of ∅, for a batch.
        terms: a tuple, see `diff_instruct/terms.py`.
        weighting (`str`): w(t), as in `weight`.
        cfg_interval: the fractions of the schedule between which guidance acts.
    """

    ta: Callable
    ref: Callable
    null: dict
    terms: tuple
    weighting: str = "dmd"
    cfg_interval: tuple = (0.0, 1.0)

    def __call__(self, x0, batch, alpha):
        """The gradient (B, C, H, W), summed over the batch, and figures to log.

        Args:
            x0: the generator's latents (B, C, H, W).
            batch ([`Batch`]): what they are made from, and noised with.
            alpha ([`Alpha`]): α_cfg and α_rew of this step.
        """
        noised, terms = self.noised(x0, batch, alpha)
        parts = {}
        for term in terms:
            for name, part in term.gradient(noised).items():
                parts[name] = parts.get(name, 0) + part
        norms = {f"norm_{name}": mean_norm(part) for name, part in parts.items()}
        figures = {**norms, **noised.figures, "x0_mean": x0.detach().mean(), "x0_std": x0.detach().std()}
        return sum(parts.values()), figures

    def noised(self, x0, batch, alpha):
        """The [`Noised`] batch, each network asked once, and the terms that act."""
        terms = [term for term in self.terms if term.acts(alpha)]
        through = {network for term in terms for network in term.through}
        leaf, t, c, schedule = x0.detach().requires_grad_(), batch.t, batch.c, self.ta.schedule
        (alpha_t, sigma_t), x_t = schedule(t), schedule.add_noise(leaf, batch.eps, t)
        with torch.set_grad_enabled("ta" in through):
            from_ta = self.ta.x0(x_t, t, c)
        with torch.set_grad_enabled("ref" in through):
            from_ref = self.ref.guided(x_t, t, c, self.null, alpha.cfg, self.cfg_interval)
        w = weight(self.weighting, alpha_t, sigma_t, leaf, from_ref.guided)
        estimates = Estimates(from_ta, from_ref.cond, from_ref.uncond, alpha.cfg, w, alpha_t, sigma_t)
        again = lambda x, s: self.ref.guided(x, s, c, self.null, alpha.cfg, self.cfg_interval).guided  # noqa: E731
        return Noised(leaf, x_t, batch, alpha, estimates, from_ref.guided, again, schedule), terms


def terms_of(args, reward, decode, phi=None, accelerator=None):
    """The terms of the method that the arguments are: a divergence, a reward and, if asked for, an anchor and a
    guard of norms.

    Args:
        reward ([`Mix`]): r(x, c).
        decode: latents to pixels.
        phi ([`Denoiser`]): the surrogate, if there is one.
        accelerator: of several processes.
    """
    of_latents = LatentReward(reward, decode, args.reward_batch_size, accelerator)
    divergence, rewarded = IKL(), CleanReward(of_latents)
    if args.divergence == "score":
        divergence = ScoreDistance(args.score_distance, args.huber_c, args.score_guidance)
    if phi is not None:
        rewarded = SurrogateReward(phi)
    if args.reward_mode == "diffused":
        rewarded = DiffusedReward(of_latents, args.diffused_reward_steps)
    return divergence, rewarded, Anchor(args.anchor_scale), NormGuard(args.norm_guard)


def generator_step(args, ta, ref, null, reward, decode, phi=None, accelerator=None):
    """The [`GeneratorStep`] of a run."""
    terms = terms_of(args, reward, decode, phi, accelerator)
    return GeneratorStep(ta, ref, null, terms, args.weighting, tuple(args.cfg_interval))
