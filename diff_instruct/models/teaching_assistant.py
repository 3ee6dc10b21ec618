"""The teaching assistant s_ψ: a full copy of the reference, or LoRA on the reference's own frozen weights."""

import copy
from contextlib import contextmanager, nullcontext

from diff_instruct.models.lora import adapters, add_lora, trainable


def make_teaching_assistant(reference, lora_rank=0, lora_alpha=None):
    """The TA, which starts as the reference; its trainable parameters are float32.

    With `lora_rank` > 0 the TA *is* the reference's module with adapters in it (one copy of the base in memory):
    inside `reference_mode` it is the reference again.
    """
    if lora_rank == 0:
        return copy.deepcopy(reference).float().requires_grad_(True)
    return add_lora(reference, lora_rank, lora_alpha)


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


def reference_mode(network, has_lora):
    """The context in which `network` acts as the frozen reference."""
    return adapters(network, False) if has_lora else nullcontext()
