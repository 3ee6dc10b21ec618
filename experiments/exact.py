"""Networks whose scores are known, for the steps of Algorithm 1 (`diff_instruct/training/steps.py`)."""

from diff_instruct.objectives import Guided, guide


class Exact:
    """What the generator's step asks of a [`Denoiser`], from functions (x_t, t) -> x̂0 = E[x0 | x_t].

    Args:
        schedule ([`Schedule`]): α_t and σ_t.
        cond: of c.
        uncond: of ∅; default: as of c.
    """

    def __init__(self, schedule, cond, uncond=None):
        self.schedule, self.cond, self.uncond = schedule, cond, uncond or cond

    def x0(self, x_t, t, c):
        """x̂0, (B, C, H, W)."""
        return self.cond(x_t, t)

    def guided(self, x_t, t, c, null, cfg_scale, interval=(0.0, 1.0)):
        """The estimates for c and ∅, and the guided one."""
        cond = self.cond(x_t, t)
        if cfg_scale == 1:
            return Guided(cond, cond, cond)
        uncond = self.uncond(x_t, t)
        return Guided(cond, uncond, guide(cond, uncond, cfg_scale))
