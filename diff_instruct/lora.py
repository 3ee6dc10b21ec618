"""LoRA by peft, in any of the networks: put in, switched off, merged."""

from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer


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
def adapters_off(network):
    """Within: the network without its adapters, that is the base. For evaluations without gradient only."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
