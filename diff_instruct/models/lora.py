"""LoRA by peft, in any of the networks: put in, switched off, merged."""

from contextlib import contextmanager, nullcontext

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def trainable(network):
    """The parameters of a network that are trained."""
    return [p for p in network.parameters() if p.requires_grad]


def add_lora(network, rank, alpha=None):
    """Freeze a network and put float32 adapters, which start as zero, into its attention and feed-forward layers.

    Works on the network itself, PixArt's included, which has no `add_adapter`. Returns it.
    """
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, network, adapter_name="default")
    for p in trainable(network):
        p.data = p.data.float()
    return network


@contextmanager
def adapters(network, enabled):
    """Within: the network with its LoRA adapters, or without them, as the base."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer) and m.disable_adapters == enabled]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]

    def switch(to):
        for layer in layers:
            layer.enable_adapters(to)
        for p, flag in flags:  # PEFT's switch also sets requires_grad
            p.requires_grad_(flag)

    switch(enabled)
    try:
        yield
    finally:
        switch(not enabled)


def checkpoint_block(block, *args):
    """Gradient checkpointing for `enable_gradient_checkpointing`, where the same block serves as TA and as reference.

    The backward pass computes the block again; that must happen with adapters as they were in the forward pass, not as
    they are then, or the gradient is silently that of the other network.
    """
    layers = [m for m in block.modules() if isinstance(m, BaseTunerLayer)]
    enabled = not any(layer.disable_adapters for layer in layers)
    contexts = lambda: (nullcontext(), adapters(block, enabled))  # noqa: E731
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


@torch.no_grad()
def merged(network):
    """A plain float32 network of the same class, the adapters added to its weights; the given one is left alone."""
    state = {k.replace(".base_layer", ""): v.float() for k, v in network.state_dict().items() if ".lora_" not in k}
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("default")
    with init_empty_weights():
        plain = type(network).from_config(network.config)
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).eval()
