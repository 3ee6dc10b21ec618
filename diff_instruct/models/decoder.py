"""Gradient checkpointing of a VAE's decoder."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_decoder(vae):
    """The backward pass through the decoder computes each block again, so that a graph holds one at a time, and before
    it each stage but the last, so that a graph holds the inputs of the blocks of one.

    From outside: diffusers' own checkpoints stages alone, whose last one holds, at 1024 pixels, three resnets' 5 GiB;
    and nothing of AutoencoderDC and AutoencoderKLQwenImage (0.42). A last stage is computed again while little else is
    held, so there it would cost time for nothing.
    """
    stages = [*vae.decoder.up_blocks]
    if getattr(vae.decoder, "mid_block", None) is not None:
        stages.insert(0, vae.decoder.mid_block)
    blocks = [
        block
        for stage in stages
        for part in stage.children()
        for block in (part if isinstance(part, nn.ModuleList) else (part,))
    ]
    for module in (*blocks, *stages[:-1]):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
