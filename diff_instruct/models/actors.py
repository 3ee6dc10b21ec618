"""The actors of Algorithm 1: generator g_θ, teaching assistant (TA) s_ψ and reference s_ref around one pipeline."""

import copy
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from diff_instruct.models.adapter_start import begin
from diff_instruct.models.decoder import checkpoint_decoder
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.loading import is_copy, load_network, load_reference, one_step_pipeline
from diff_instruct.models.lora import add_lora, checkpoint_network
from diff_instruct.models.roles import bases, on_base
from diff_instruct.models.sharding import place
from pipeline_one_step import OneStepPipeline


@dataclass
class Actors:
    """`stock`: the reference's pipeline; `pipe`: the one that is trained and shipped; `cast`: the [`Denoiser`] of each
    role, by name; `start`: lines that say how closely the generator starts as what is named."""

    stock: DiffusionPipeline
    pipe: OneStepPipeline
    cast: dict
    start: tuple = ()

    @property
    def networks(self):
        """Those of the roles, each once."""
        return list({id(role.network): role.network for role in self.cast.values()}.values())

    @property
    def generator(self):
        return self.cast["generator"]

    @property
    def ta(self):
        return self.cast["ta"]

    @property
    def surrogate(self):
        """φ, or None."""
        return self.cast.get("surrogate")

    @property
    def ref(self):
        return self.cast["ref"]


def compile_blocks(network):
    """torch.compile for each of the blocks that a network repeats: compiled once, shared by all of them."""
    names = network._repeated_blocks or network._no_split_modules
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile()


def load_bases(models, roles, reference, *rounded):
    """The network under each base, by name, with the adapters of the roles that stand on it.

    It begins with the reference, the last of the roles, and what is copied from it in memory, before the first adapter
    is put into it. (Reading files and drawing adapters both take random numbers: their order is a part of the seed.)

    Args:
        rounded: further arguments of `load_network`.
    """
    networks = {"ref": reference}

    def make(name):
        _, in_full = on_base(roles, name)
        dtype = torch.float32 if in_full else reference.dtype
        if name == "generator":
            network = load_network(models, reference, dtype, *rounded)
        else:  # starts as the reference
            network = copy.deepcopy(reference).to(dtype)
        networks[name] = network.requires_grad_(in_full)

    for name in bases(roles):
        if name not in networks and (name != "generator" or is_copy(models)):
            make(name)
    for role in reversed(roles):
        if role.base not in networks:
            make(role.base)
        if role.rank:
            add_lora(networks[role.base], role.name, role.rank, role.alpha, models.targets_of(role))
    return networks


def load_actors(models, roles, device, dtype, autocast, args, afresh=True, is_main=True):
    """Load them, frozen parts in `dtype`, on `device`.

    Args:
        models ([`Models`]): where they come from.
        roles: a tuple of [`Role`].
        autocast: the context in which networks run.
        afresh: whether nothing trained is loaded afterwards.
        is_main: whether this process shows how far it is.
    """
    rounded = args.base_quantization, device
    stock = load_reference(models, dtype, *rounded)
    networks = load_bases(models, roles, getattr(stock, models.denoiser), *rounded)
    network_of = {role.name: networks[role.base] for role in roles}
    start = begin(models, roles, network_of["generator"], stock, device, is_main) if afresh else ()
    pipe = one_step_pipeline(models, stock, network_of["generator"])
    for network in networks.values():
        if args.gradient_checkpointing:
            checkpoint_network(network, models.family)
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
    for role in roles:
        if role.trained:
            network_of[role.name].train()
    cast = {role.name: Denoiser(pipe, network_of[role.name], role.adapter, autocast) for role in roles}
    return Actors(stock, pipe, cast, start)
