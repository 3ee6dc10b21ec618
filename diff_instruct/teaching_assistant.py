"""The teaching assistant s_ψ: a full copy of the reference, or LoRA on the reference's own frozen weights."""

import copy
from contextlib import contextmanager, nullcontext

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def make_teaching_assistant(reference, lora_rank=0, lora_alpha=None):
    """The TA, which starts as the reference; its trainable parameters are float32.

    With `lora_rank` > 0 the TA *is* the reference's module with adapters in it (one copy of the base in memory):
    inside `reference_mode` it is the reference again.
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
def frozen(network):
    """Within: nothing of the network is trained; a graph through it holds only what its input's gradient needs."""
    parameters = trainable(network)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextmanager
def adapters(network, enabled):
    """Within: the network with its LoRA adapters, or without them, as the reference."""
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


def reference_mode(network, has_lora):
    """The context in which `network` acts as the frozen reference."""
    return adapters(network, False) if has_lora else nullcontext()


def checkpoint_block(block, *args):
    """Gradient checkpointing for `enable_gradient_checkpointing`, where the same block serves as TA and as reference.

    The backward pass computes the block again; that must happen with adapters as they were in the forward pass, not as
    they are then, or the gradient is silently that of the other network.
    """
    layers = [m for m in block.modules() if isinstance(m, BaseTunerLayer)]
    enabled = not any(layer.disable_adapters for layer in layers)
    contexts = lambda: (nullcontext(), adapters(block, enabled))  # noqa: E731
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)
