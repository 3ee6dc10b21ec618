"""FSDP2: each process holds a share of every parameter, and gathers a block's weights when it computes the block.

Shares are DTensors, split along their first dimension. Every pass through a sharded network is collective: all
processes take it together, on inputs of their own.
"""

import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_chosen():
    """Whether accelerate is configured for FSDP, and there are processes to share among."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and torch.distributed.is_initialized()


def processes():
    """How many share a network."""
    return torch.distributed.get_world_size() if is_chosen() else 1


def place(network, device, dtype):
    """Put a network on the device: whole, or with FSDP2 this process's share of it, block by block.

    accelerate prepares one model with its one optimizer; here are up to three, in several roles. So the library below
    it is asked: each of the blocks that diffusers names is a unit of its own, what is left of the network another.

    Args:
        dtype: of computing; blocks are gathered in it, gradients are averaged in float32.
    """
    if not is_chosen():
        return network.to(device)
    options = {
        "mesh": init_device_mesh(torch.device(device).type, (processes(),)),
        # inputs stay as they are, timesteps above all; autocast casts them where a layer wants it
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": True,  # of the rest, too: what is kept would not see a step that is taken meanwhile
    }
    blocks = network._no_split_modules or getattr(network, "_repeated_blocks", None) or ()
    name = type(network).__name__
    for module in reversed([m for m in network.modules() if type(m).__name__ in blocks]):  # the inner ones first
        fully_shard(module, **options)
    fully_shard(network, **options)
    type(network).__name__ = name  # as config.json has it
    return network


def is_share(tensor):
    """Whether a process holds only its share of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor):
    """A tensor of all processes' shares, gathered by all of them; any other tensor as it is."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_as(tensor, like):
    """This process's share of a whole tensor, split as `like` is; the tensor itself where `like` is not split."""
    if not is_share(like):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
