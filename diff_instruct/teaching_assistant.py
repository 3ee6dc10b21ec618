"""The teaching assistant s_ψ: a full copy of the reference, or LoRA on the reference's own frozen weights."""

import copy
from contextlib import contextmanager, nullcontext

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def make_teaching_assistant(reference, lora_rank=0, lora_alpha=None):
    """The TA, which starts as the reference; its trainable parameters are float32.

    With `lora_rank` > 0 the TA *is* the reference's module with adapters in it (one copy of the base in memory):
    inside `adapters_off` it is the reference again.
    """
    if lora_rank == 0:
        return copy.deepcopy(reference).float().requires_grad_(True)
    config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha or lora_rank, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, reference, adapter_name="default")
    for p in trainable(reference):
        p.data = p.data.float()
    return reference


def trainable(network):
    """The parameters of a network that are trained."""
    return [p for p in network.parameters() if p.requires_grad]


@contextmanager
def adapters_off(network):
    """Within: the network without its LoRA adapters, that is the reference. For evaluations without gradient only."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def reference_mode(network, has_lora):
    """The context in which `network` acts as the frozen reference."""
    return adapters_off(network) if has_lora else nullcontext()
