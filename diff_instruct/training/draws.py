"""What Algorithm 1 draws, batch by batch."""

import torch

from diff_instruct.surrogate import level_timesteps
from diff_instruct.terms import Batch


class Draws:
    """The batches of an optimizer step: c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I).

    Args:
        sampler ([`Sampler`]): of prompts and random numbers.
        encode: prompts to conditioning.
        schedule ([`Schedule`]): of the networks.
        passes (`int`): batches of an optimizer step, one for each forward and backward pass.
        low, high: π(t)'s ends, as fractions of the schedule.
        shift: s of π(t), see `shifted`.
        pairs ([`PairStream`], *optional*): of the reference's own.
        anchored_from (`int`, *optional*): the generator's steps take pairs, from those of this step on.

    `draws.prompts` are those of the batches since it was last cleared.
    """

    def __init__(self, sampler, encode, schedule, passes, low, high, shift=1.0, pairs=None, anchored_from=None):
        self.sampler, self.encode, self.schedule, self.pairs = sampler, encode, schedule, pairs
        self.passes, self.low, self.high, self.shift = passes, low, high, shift
        self.anchored_from, self.prompts = anchored_from, []

    def __call__(self):
        """Yield the [`Batch`]es of one optimizer step."""
        for _ in range(self.passes):
            yield self.batch(self.sampler())

    def of_theta(self, step):
        """Yield those of the generator's step: of pairs, if it has an anchor."""
        return self() if self.anchored_from is None else self.of_pairs(self.anchored_from + step)

    def of_pairs(self, number):
        """Yield those of optimizer step 0, 1, ... on pairs: c and z are theirs, and x0 is the `target`."""
        for i in range(number * self.passes, (number + 1) * self.passes):
            draw, x0 = self.pairs(i)
            yield self.batch(draw)._replace(target=x0)

    def batch(self, draw):
        """The [`Batch`] of a [`Draw`]."""
        self.prompts.extend(draw.prompts)
        c, t, again = self.encode(draw.prompts), self.pi(draw.u), (self.pi(draw.u_again), draw.eps_again)
        return Batch(draw.prompts, c, draw.z, draw.noise, draw.step, t, draw.eps, again=again)

    def pi(self, u):
        """t ~ π(t), (B,), of u ~ U[0, 1)."""
        u = u if self.shift == 1 else shifted(u, self.low, self.high, self.shift)
        return self.schedule.timesteps(u, self.low, self.high).to(self.sampler.device)

    def groups(self, n):
        """Yield those of a surrogate's step: n samples for each prompt, all after the same step of the generator.
        Their t are levels for [`Surrogate`]: those of a group at equal distances in log-SNR, from an offset that is
        drawn. Of G groups, samples g, g + G, g + 2 G, ... are one: so processes share out whole groups."""
        for _ in range(self.passes):
            draw = self.sampler()
            groups = len(draw.prompts) // n
            prompts, step = draw.prompts[:groups] * n, draw.step[:groups].repeat(n)
            u = (torch.arange(n).repeat_interleave(groups) + draw.u[:groups].repeat(n)) / n
            t = level_timesteps(u, self.schedule, self.low, self.high).to(draw.z.device)
            yield self.batch(draw._replace(prompts=prompts, step=step))._replace(t=t)


def shifted(u, low, high, s):
    """The place between `low` and `high`, in [0, 1), of σ = s v / (1 + (s − 1) v), v uniform where σ is between them:
    how samplers of flow matching shift noise levels (SD3, arXiv 2403.03206, eq. 23). More noise for s > 1."""
    first, last = (x / (s - (s - 1) * x) for x in (low, high))
    v = first + u * (last - first)
    return ((s * v / (1 + (s - 1) * v) - low) / (high - low)).clamp(0, 1 - 2**-24)
