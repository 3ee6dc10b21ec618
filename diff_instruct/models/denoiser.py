"""The networks of Algorithm 1 at work: generator g_θ, teaching assistant s_ψ, reference s_ref."""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence

from diff_instruct.models.lora import acting, lora_layers
from diff_instruct.models.sharding import is_chosen
from diff_instruct.objectives import Guided, denoising_loss, guide


def stacked(c, null):
    """The conditioning of the rows of c and, after them, of ∅; fewer tokens are filled up with zeros."""
    return {k: pad_sequence([*v, *null[k]], batch_first=True) for k, v in c.items()}


class Denoiser:
    """A network of the family in the role that its adapter gives it.

    The three roles may be one module: then an adapter of its own makes the generator, another one the TA, and the base
    alone is the reference. The network is evaluated by the pipeline that is shipped.

    Args:
        pipe ([`OneStepPipeline`]): knows how networks of the family are called; its schedule is that of all of them.
        network: the module.
        adapter: "generator", "ta", or None: the network without any adapters.
        autocast: the context in which it runs, for mixed precision.
    """

    def __init__(self, pipe, network, adapter=None, autocast=nullcontext):
        self.pipe, self.schedule, self.network, self.adapter = pipe, pipe.schedule, network, adapter
        self.layers, self.autocast = lora_layers(network), autocast

    @contextmanager
    def act(self):
        """The context in which the network has this role."""
        with acting(self.layers, self.adapter), self.autocast():
            yield

    def __call__(self, x_t, t, c):
        """The network's output, (B, C, H, W), float32."""
        with self.act():
            return self.pipe.denoise(self.network, x_t, t, c)

    def generate(self, z, c, noise=(), step=None):
        """g_θ(z, c), latents x0 (B, C, H, W): see `OneStepPipeline.generate`."""
        with self.act():
            return self.pipe.generate(self.network, z, c, noise, step, all_steps=is_chosen())

    def x0(self, x_t, t, c):
        """x̂0 of s(x_t, t, c), (B, C, H, W)."""
        return self.schedule.x0(self(x_t, t, c), x_t, t)

    def guided(self, x_t, t, c, null, cfg_scale, interval=(0.0, 1.0)):
        """The estimates for c and ∅, in one call, and the guided one; ∅ is not asked for at α_cfg = 1.

        Args:
            interval: the fractions of the schedule between which guidance acts; elsewhere the estimate for ∅ is that
                for c, and is not asked for (Kynkäänniemi et al., arXiv 2404.07724); but where each prompt is a call
                of its own it is, with FSDP2, since all processes must take equally many.
        """
        if cfg_scale == 1:
            cond = self.x0(x_t, t, c)
            return Guided(cond, cond, cond)
        low, high = (fraction * self.schedule.steps for fraction in interval)
        inside, acts = (low <= t) & (t <= high), torch.arange(len(t), device=t.device)
        if tuple(interval) != (0, 1) and not (self.pipe.family.alone and is_chosen()):
            acts = inside.nonzero().flatten()  # a look at t, which a GPU waits for
        c_and_null = stacked(c, {k: v[acts] for k, v in null.items()})
        both = self.x0(torch.cat([x_t, x_t[acts]]), torch.cat([t, t[acts]]), c_and_null)
        cond, uncond = both.split([len(t), len(acts)])
        uncond = torch.where(inside.view(-1, 1, 1, 1), cond.index_copy(0, acts, uncond), cond)
        return Guided(cond, uncond, guide(cond, uncond, cfg_scale))

    def loss(self, x_t, eps, t, c):
        """λ(t) ‖s(x_t, t, c) − ∇ log p(x_t | x0)‖², the mean over elements."""
        eps_hat = self.schedule.epsilon(self(x_t, t, c), x_t, t)
        return denoising_loss(eps_hat, eps, self.schedule.loss_weight(t))
