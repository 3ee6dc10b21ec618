"""Weights into files one tensor after the other, so that no copy of a network is ever in memory."""

import json
import math
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(path, shapes, tensors, dtype=torch.float32):
    """One safetensors file: the length of a JSON header (8 bytes), the header, and the tensors' bytes.

    Args:
        shapes (`dict`): by name, in the order in which `tensors` come.
        tensors: iterable of tensors, taken one at a time.
    """
    header, end, size = {"__metadata__": {"format": "pt"}}, 0, dtype.itemsize
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{path}: expected a tensor {tuple(shape)}, but got {tuple(tensor.shape)}")
            file.write(tensor.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())


def save_network(network, folder, state, dtype=torch.float32, max_shard_size="10GB"):
    """What `network.save_pretrained(folder)` would write, with other weights, each of them made when it is written.

    Args:
        network (`ModelMixin`): whose config is written.
        state (`dict`): name to function of no arguments that makes the tensor; and `.shape` of it. See `lora.merged`.
        max_shard_size: of one file; the default is diffusers'.
    """
    folder = Path(folder)
    network.save_config(folder)
    empty = {name: torch.empty(make.shape, dtype=dtype, device="meta") for name, make in state.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    shards = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        shapes = {name: empty[name].shape for name in names}
        write_tensors(folder / file, shapes, (state[name]() for name in names), dtype)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
