"""Generators that start as adapters on the reference's own weights: as a LoRA of the reference, such as a turbo's."""

import re

import torch
from peft import PeftModel

from diff_instruct.models.lora import lora_layers
from diff_instruct.models.published import empty_like


START = "start"  # the name of the adapters while they are read


def targets_with(targets, layers):
    """peft's `target_modules` that reach, beside `targets`, these layers, too."""
    if isinstance(targets, str):
        return "|".join([f"(?:{targets})", *map(re.escape, layers)])
    return tuple(dict.fromkeys([*targets, *layers]))


def without_weights(network):
    """The same network whose weights take no memory: all zero, in float32, so that adapters read into it are exact."""
    network = empty_like(network, torch.float32)
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return network


def read_adapters(lora, stock, denoiser):
    """The adapters of LoRA weights by layer, (A, B), float32, with α and scale in B: the weight's change is B A.

    The libraries read them, whatever their names are (diffusers', peft's, kohya's), into a network without weights.

    Args:
        lora ([`Lora`]): for the network of the name `denoiser` of the pipeline `stock`, which stays as it is.
    """
    network = getattr(stock, denoiser)
    empty = without_weights(network)
    if lora.peft_config is not None:
        PeftModel.from_pretrained(empty, lora.path, adapter_name=START, cache_dir=lora.cache_dir)
    else:
        setattr(stock, denoiser, empty)
        try:
            stock.load_lora_weights(lora.path, cache_dir=lora.cache_dir, adapter_name=START)
        finally:
            setattr(stock, denoiser, network)
    found = {}
    for name, layer in empty.named_modules():
        if layer in lora_layers(empty) and START in layer.lora_A:
            a, b = (part[START].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
            found[name] = a, b * (layer.scaling[START] * lora.scale)
    return found


@torch.no_grad()
def start_adapters(network, name, adapters):
    """Let the adapters of this name begin as those of `read_adapters`, of their rank or a lower one.

    The rest of the rank begins as adapters do, without any effect.
    """
    for layer_name, (a, b) in adapters.items():
        layer = network.get_submodule(layer_name)
        own_a, own_b, rank = layer.lora_A[name].weight, layer.lora_B[name].weight, len(a)
        own_a[:rank] = a.to(own_a)
        own_b[:, :rank] = (b / layer.scaling[name]).to(own_b)
