"""The actors of Algorithm 1: generator g_θ, teaching assistant (TA) s_ψ and reference s_ref around one pipeline."""

import copy
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from diff_instruct.models.decoder import checkpoint_decoder
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.lora import add_lora, checkpoint_block
from diff_instruct.models.sharding import place
from pipeline_one_step import OneStepPipeline


class Actors(NamedTuple):
    """`stock`: the reference's pipeline; `pipe`: the one that is trained and shipped; the networks at work."""

    stock: DiffusionPipeline
    pipe: OneStepPipeline
    generator: Denoiser
    ta: Denoiser
    ref: Denoiser


def compile_blocks(network):
    """torch.compile for each of the blocks that a network repeats: compiled once, shared by all of them."""
    names = network._repeated_blocks or network._no_split_modules
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile()


def load_actors(models, device, dtype, autocast, args):
    """Load them, frozen parts in `dtype`, on `device`.

    The TA starts as the reference: a float32 copy, or, with `--ta_lora_rank`, adapters on its own weights. With
    `--lora_rank` a generator that starts as the reference shares that base, too: then one frozen network plays all
    three roles.
    """
    stock = load_reference(models, dtype)
    reference, targets = getattr(stock, models.denoiser), models.family.lora_targets
    if args.ta_lora_rank > 0:
        ta = add_lora(reference, "ta", args.ta_lora_rank, args.ta_lora_alpha, targets)
    else:
        ta = copy.deepcopy(reference).float().requires_grad_(True)
    pipe = load_generator(models, stock, args.lora_rank, args.lora_alpha, share_base=models.generator is None)
    networks = {id(network): network for network in (pipe.denoiser, ta, reference)}.values()
    for network in networks:
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing(models.family.checkpointed(checkpoint_block))
        if args.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
        if args.compile:
            compile_blocks(network)
        place(network, device, dtype)
    if args.gradient_checkpointing:
        checkpoint_decoder(stock.vae)
    waiting = args.prompt_cache or args.offload_text_encoder  # until there are prompts to encode
    for name, part in stock.components.items():
        if isinstance(part, torch.nn.Module) and not (waiting and name.startswith("text_encoder")):
            part.to(device)
    pipe.denoiser.train()
    ta.train()
    return Actors(
        stock,
        pipe,
        generator=Denoiser(pipe, pipe.denoiser, "generator" if args.lora_rank else None, autocast),
        ta=Denoiser(pipe, ta, "ta" if args.ta_lora_rank else None, autocast),
        ref=Denoiser(pipe, reference, None, autocast),
    )
