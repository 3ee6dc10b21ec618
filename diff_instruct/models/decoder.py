"""Gradient checkpointing of a VAE's decoder."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_decoder(vae):
    """The backward pass through the decoder computes each block again, so that a graph holds one at a time, and before
    it each stage but the last, so that a graph holds the inputs of the blocks of one.

    From outside: diffusers' own checkpoints stages alone, whose last one holds, at 1024 pixels, three resnets' 5 GiB;
    and nothing of AutoencoderDC and AutoencoderKLQwenImage (0.42). A last stage is computed again while little else is
    held, so there it would cost time for nothing. Within a block nothing that a convolution is given is held for it,
    see `FrozenConvolution`.
    """
    for module in vae.decoder.modules():
        plain = isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.padding_mode == "zeros"
        if plain and {*module.stride, module.groups} == {1} and not isinstance(module.padding, str):
            module._conv_forward = partial(frozen_convolution, module)
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


class FrozenConvolution(torch.autograd.Function):
    """A convolution of stride 1 with frozen weights. The gradient at its input is the transposed convolution of that
    at its output, for which no input is needed; PyTorch's own graph holds it all the same."""

    @staticmethod
    def forward(ctx, x, weight, bias, *options):
        ctx.save_for_backward(weight)
        ctx.options = options
        return (nn.functional.conv2d if x.dim() == 4 else nn.functional.conv3d)(x, weight, bias, 1, *options)

    @staticmethod
    def backward(ctx, gradient):
        (weight,), (padding, dilation) = ctx.saved_tensors, ctx.options
        transposed = nn.functional.conv_transpose2d if gradient.dim() == 4 else nn.functional.conv_transpose3d
        at_input = transposed(gradient, weight, None, 1, padding, dilation=dilation)
        return at_input, *[None] * 4


def frozen_convolution(module, x, weight, bias):
    """A convolution's `_conv_forward`."""
    return FrozenConvolution.apply(x, weight, bias, module.padding, module.dilation)
