"""What Algorithm 1 draws, batch by batch."""

from diff_instruct.terms import Batch


class Draws:
    """The batches of an optimizer step: c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I).

    Args:
        sampler ([`Sampler`]): of prompts and random numbers.
        encode: prompts to conditioning.
        schedule ([`Schedule`]): of the networks.
        passes (`int`): batches of an optimizer step, one for each forward and backward pass.
        low, high: π(t)'s ends, as fractions of the schedule.

    `draws.prompts` are those of the batches since it was last cleared.
    """

    def __init__(self, sampler, encode, schedule, passes, low, high):
        self.sampler, self.encode, self.schedule = sampler, encode, schedule
        self.passes, self.low, self.high = passes, low, high
        self.prompts = []

    def __call__(self):
        """Yield the [`Batch`]es of one optimizer step."""
        for _ in range(self.passes):
            prompts, z, eps, u, noise, step = self.sampler()
            self.prompts.extend(prompts)
            t = self.schedule.timesteps(u, self.low, self.high).to(z.device)
            yield Batch(prompts, self.encode(prompts), z, noise, step, t, eps)
