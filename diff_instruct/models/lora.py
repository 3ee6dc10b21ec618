"""LoRA by peft, in any of the networks: named adapters in one base, who of them acts, merged."""

import warnings
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint

from diff_instruct.models.sharding import whole


def add_lora(network, name, rank, alpha, targets):
    """Freeze a network and put float32 adapters, which start as zero, into its layers; returns it.

    Works on the network itself, PixArt's included, which has no `add_adapter`. Adapters of other names may be there.

    Args:
        name: of the adapters, "generator" or "ta".
        targets: ends of the names of the layers, as in peft.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets))
    with warnings.catch_warnings():  # that there are adapters already is what is wanted
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, network, adapter_name=name)
    network.requires_grad_(False)
    for p in trained_parameters(network, name).values():
        p.data = p.data.float()
    return network


def trained_parameters(network, adapter=None):
    """What is trained of a network, by name: its adapters of this name, or all of it."""
    parameters = dict(network.named_parameters())
    return parameters if adapter is None else {k: p for k, p in parameters.items() if f".{adapter}." in k}


def lora_layers(network):
    """The layers that adapters are in."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def acting(layers, name):
    """Within: the adapters of this name act in the layers; none of them, so the base alone, if it is None.

    Which parameters require a gradient does not change.
    """
    before = [None if layer.disable_adapters else layer.active_adapters for layer in layers]

    def switch(layer, to):
        flags = [(p, p.requires_grad) for p in layer.parameters()]  # which peft's switches set, too
        layer.enable_adapters(to is not None)
        if to is not None:
            layer.set_adapter(to)
        for p, flag in flags:
            p.requires_grad_(flag)

    for layer in layers:
        switch(layer, name)
    try:
        yield
    finally:
        for layer, to in zip(layers, before):
            switch(layer, to)


def checkpoint_block(block, *args):
    """Gradient checkpointing for `enable_gradient_checkpointing`, where one network acts in several roles.

    The backward pass computes the block again; that must happen with adapters as they were in the forward pass, not as
    they are then, or the gradient is silently that of another role.
    """
    layers = lora_layers(block)
    role = None
    if layers and not layers[0].disable_adapters:
        role = layers[0].active_adapters[0]
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (acting([], None), acting(layers, role)))


class Merged:
    """A float32 weight of a network with adapters merged into it; calling it makes the tensor.

    Of a sharded network all processes call it, and each gets the whole tensor.
    """

    def __init__(self, weight, layer=None, adapter=None):
        self.weight, self.layer, self.adapter, self.shape = weight, layer, adapter, weight.shape

    @torch.no_grad()
    def __call__(self):
        weight = whole(self.weight.detach()).float()
        return weight if self.layer is None else weight + whole(self.layer.get_delta_weight(self.adapter))


def merged(network, adapter):
    """The state of a plain network of the same class, the adapters, if any, added to its weights: name to [`Merged`].

    Nothing is computed before a tensor is asked for, so a network larger than what is free can be written to a file.
    """
    state = {k.replace(".base_layer", ""): Merged(v) for k, v in network.state_dict().items() if ".lora_" not in k}
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            key = f"{name}.weight"
            state[key] = Merged(state[key].weight, layer, adapter)
    return state
