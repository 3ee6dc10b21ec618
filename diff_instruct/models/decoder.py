"""Gradient checkpointing of a VAE's decoder, diffusers' own or from outside."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def decoder_blocks(decoder):
    """What the middle and the stages of a decoder consist of: resnets, attentions, upsamplers."""
    for stage in (getattr(decoder, "mid_block", None), *decoder.up_blocks):
        for part in () if stage is None else stage.children():
            yield from part if isinstance(part, nn.ModuleList) else (part,)


def checkpoint_decoder(vae):
    """The backward pass through the decoder computes each of its blocks again, so that a graph holds one at a time.

    diffusers does so itself where it can, which it cannot for AutoencoderDC and AutoencoderKLQwenImage (0.42).
    """
    if vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()
        return
    for block in decoder_blocks(vae.decoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
