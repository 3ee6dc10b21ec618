# SPDX-License-Identifier: Apache-2.0
"""Sana-Sprint."""

import torch

from diff_instruct.families.sana import Sana


class SanaSprint(Sana):
    """Sana-Sprint: Sana with guidance as an input. It knows no ∅. Its trigonometric flow at angle a is the straight
    one at σ = sin a / (sin a + cos a), which is what its network takes as the time."""

    name = "SanaSprintPipeline"
    has_null = False
    options = {"use_resolution_binning": False, "intermediate_timesteps": None}  # the latter is for two steps only
    embedded_guidance = 4.5

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        guidance = pipe.config.embedded_guidance * pipe.denoiser.config.guidance_embeds_scale
        guidance = torch.full((len(t),), guidance, dtype=x_t.dtype, device=t.device)
        return Sana.denoise(pipe, network, x_t, t, c, timestep=t / pipe.schedule.steps, guidance=guidance)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": embedded}

    @staticmethod
    def stock_latents(z, sigma=1.0):
        return z / (sigma**2 + (1 - sigma) ** 2) ** 0.5  # it rescales what it is given to its own convention

    @classmethod
    def stock_setup(cls):
        return f"""\
import math
from diffusers import SCMScheduler
{super().stock_setup()}stock.scheduler = SCMScheduler()
sigmas = [t / pipe.schedule.steps for t in pipe.timesteps]
angles = [*(math.atan2(s, 1 - s) for s in sigmas), 0.0]
timesteps = {{"timesteps": angles, "max_timesteps": None, "intermediate_timesteps": None}}
set_timesteps = stock.scheduler.set_timesteps  # the pipeline's own argument for them does not arrive
stock.scheduler.set_timesteps = lambda n, device=None, **_: set_timesteps(n, device=device, **timesteps)
"""

    @classmethod
    def stock_arguments(cls, pipe):
        steps = {"num_inference_steps": len(pipe.timesteps), "guidance_scale": pipe.config.embedded_guidance}
        return {**steps, **cls.options}
