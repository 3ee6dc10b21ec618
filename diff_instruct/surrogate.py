"""A diffusion model φ that learns what a judge prefers from numbers alone, and the formulas of it.

p_φ starts as the reference p_ref, and what it learns is r̃(x0) = log p_φ(x0 | c) − log p_ref(x0 | c): by Bradley–Terry
on pictures of one prompt, so that p_φ becomes p_ref exp(α_rew r) up to a constant. The generator then follows s_φ: no
gradient of the reward is needed. The idea is TDM-R1's (arXiv 2603.07700).

The log-likelihood of x0 is an integral of denoising errors over the log-SNR λ = log(α² / σ²) (Kingma et al., arXiv
2107.00630):

    log p(x0) = −½ ∫ E ‖ε − ε̂(x_λ)‖² dλ + constant.

So the levels are uniform in λ, and their errors count alike. Other weights give a tilt of another size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diff_instruct.rewards.asking import ask, on_all
from diff_instruct.terms import Batch


LOWEST = -6.0  # λ of the noisiest level: below it is 0.25% of the log-likelihood of data with variance 1


def levels(schedule, low, high):
    """Timesteps of π(t)'s range and their log-SNR, both (T,), from `LOWEST` up; λ falls with t."""
    ends = schedule.timesteps(torch.tensor([0.0, 1 - 1e-6]), low, high)
    t = torch.arange(int(ends[0]), int(ends[1]) + 1)
    alpha, sigma = schedule(t)
    log_snr = 2 * (alpha.double() / sigma.double()).log().flatten()
    return t[log_snr >= LOWEST], log_snr[log_snr >= LOWEST]


def level_timesteps(u, schedule, low, high):
    """Integer timesteps, (B,), whose log-SNR is uniform, from u ~ U[0, 1), (B,)."""
    t, log_snr = levels(schedule, low, high)
    wanted = log_snr[0] + u.to(log_snr) * (log_snr[-1] - log_snr[0])
    return t[(log_snr - wanted[:, None]).abs().argmin(dim=1)]


def log_ratio(x0, x0_phi, x0_ref, alpha, sigma, span):
    """One level's estimate of log p_φ(x0) − log p_ref(x0), (B,): −½ Λ (‖ε − ε̂_φ‖² − ‖ε − ε̂_ref‖²), sums over elements.

    Args:
        x0: clean latents (B, C, H, W).
        x0_phi, x0_ref: estimates of them from the same x_t, so with the same ε.
        alpha, sigma: of that level, (B, 1, 1, 1).
        span: Λ, the range of log-SNR that levels are drawn from.
    """
    shift = x0_phi - x0_ref  # ε − ε̂ = (α/σ)(x̂0 − x0); the difference of two squares, without cancellation
    return -0.5 * span * ((alpha / sigma) ** 2 * shift * (shift - 2 * (x0 - x0_ref))).flatten(1).sum(dim=1)


def bradley_terry(log_ratios, rewards, reward_scale):
    """KL(label ‖ prediction) over the pairs (a, b) of a group, the mean over pairs and groups, in nats.

    The label is P(a ≻ b) = σ(α_rew (r_a − r_b)), what is predicted σ(r̃_a − r̃_b): equal where r̃ = α_rew r + constant.
    So α_rew is the exponent of the tilt, as it is for a diffused reward.

    Args:
        log_ratios: r̃, (G, n), of n pictures for each of G prompts; rewards: (G, n).
        reward_scale: α_rew.
    """
    a, b = torch.triu_indices(log_ratios.shape[1], log_ratios.shape[1], offset=1, device=log_ratios.device)
    label = torch.sigmoid(reward_scale * (rewards[:, a] - rewards[:, b]))
    entropy = torch.special.entr(label) + torch.special.entr(1 - label)
    cross = F.binary_cross_entropy_with_logits(log_ratios[:, a] - log_ratios[:, b], label, reduction="none")
    return (cross - entropy).mean()


class Asked(NamedTuple):
    """A [`Batch`] whose pictures x0 a judge has been asked about, and functions that wait for its numbers."""

    batch: Batch
    answers: list[Callable]


class Surrogate:
    """What φ learns from: pictures of the generator, n of one prompt, the judge's numbers, and both networks' errors.

    A picture's r̃ is the mean over n levels *inside* the sigmoid, where what its estimate varies by would make the tilt
    smaller. So the levels are at equal distances, which sums a function that vanishes at both ends far better than
    independent ones, and the pictures of a group share (t, ε) of a level, whose noise then cancels between them.

    Args:
        generator, phi, ref ([`Denoiser`]): g_θ, φ and the reference.
        reward ([`Mix`]), decode: r(x, c) of what latents are decoded to.
        group (`int`): n.
        low, high: of π(t).
        batch_size (`int`, *optional*): images decoded and scored at a time.
        accelerator: of several processes, which all end when one has no scores.
    """

    def __init__(self, generator, phi, ref, reward, decode, group, low, high, batch_size=None, accelerator=None):
        self.generator, self.phi, self.ref, self.reward, self.decode = generator, phi, ref, reward, decode
        self.group, self.batch_size, self.accelerator = group, batch_size, accelerator
        _, log_snr = levels(phi.schedule, low, high)
        self.span = float(log_snr[0] - log_snr[-1])

    @torch.no_grad()
    def ask(self, batch):
        """Draw the pictures of a batch of [`Draws`]`.groups`, and ask the judge, without waiting for one that is
        elsewhere: what was [`Asked`].

        Raises:
            NoScores: on all processes.
        """
        x0 = self.generator.generate(batch.z, batch.c, batch.noise, batch.step)
        size = self.batch_size or len(x0)
        with on_all(self.accelerator):
            answers = [
                ask(self.reward, self.decode(x0[i : i + size]), batch.prompts[i : i + size])
                for i in range(0, len(x0), size)
            ]
        return Asked(batch._replace(x0=x0), answers)

    def loss(self, asked, reward_scale):
        """The loss of what was [`Asked`], with gradient for φ alone, and figures to log.

        Raises:
            NoScores: on all processes, before φ has been asked for anything.
        """
        batch, x0 = asked.batch, asked.batch.x0
        with torch.no_grad(), on_all(self.accelerator):
            r = torch.cat([answer() for answer in asked.answers])
        groups = len(x0) // self.group
        of_group = torch.arange(groups, device=x0.device).repeat(self.group)
        total = sum(self.at_level(x0, batch, of_group + groups * level) for level in range(self.group)) / self.group
        loss = bradley_terry(total.view(self.group, groups).T, r.view(self.group, groups).T, reward_scale)
        return loss, {"surrogate_loss": loss.detach(), "reward": r.mean()}

    def at_level(self, x0, batch, rows):
        """The estimate of r̃, (B,), at the (t, ε) of these rows of the batch."""
        t, eps = batch.t[rows], batch.eps[rows]
        x_t = self.phi.schedule.add_noise(x0, eps, t)
        with torch.no_grad():
            from_ref = self.ref.x0(x_t, t, batch.c)
        return log_ratio(x0, self.phi.x0(x_t, t, batch.c), from_ref, *self.phi.schedule(t), self.span)
