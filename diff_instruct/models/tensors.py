"""Weights into files one tensor after the other, so that no copy of a network is ever in memory."""

import json
from collections import deque
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards

from diff_instruct.files import whole as whole_file
from diff_instruct.models.sharding import whole


DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_tensors(path, like, tensors):
    """One safetensors file: the length of a JSON header (8 bytes), the header, and the tensors' bytes.

    Args:
        like (`dict`): tensors by name, in the order in which `tensors` come, for their shapes and dtypes.
        tensors: iterable of tensors, taken one at a time.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, expected in zip(tensors, like.values(), strict=True):
            if tensor.shape != expected.shape:
                raise ValueError(f"{path}: expected a tensor {tuple(expected.shape)}, but got {tuple(tensor.shape)}")
            file.write(tensor.detach().to("cpu", expected.dtype).contiguous().view(-1).view(torch.uint8).numpy())


def write_files(states, writes=True):
    """Safetensors files of tensors by name, each of them gathered, where it is sharded, when it is written.

    Args:
        states (`dict`): path to `dict` of tensors.
        writes (`bool`): False on the processes that only give their shares.
    """
    gathered = {path: (whole(tensor) for tensor in state.values()) for path, state in states.items()}
    try:
        for path, state in states.items() if writes else ():
            write_tensors(path, state, gathered[path])
    finally:  # a full disk here must not leave the other processes waiting
        for tensors in gathered.values():
            deque(tensors, maxlen=0)


def save_network(network, folder, state, dtype=torch.float32, max_shard_size="10GB"):
    """What `network.save_pretrained(folder)` would write, with other weights, each of them made when it is written.

    Args:
        network (`ModelMixin`): whose config is written.
        folder: None on the processes that write nothing, but have shares of the tensors.
        state (`dict`): name to function of no arguments that makes the tensor; and `.shape` of it. See `lora.merged`.
        max_shard_size: of one file; the default is diffusers'.
    """
    if folder is not None:
        folder = Path(folder)
        network.save_config(folder)
    empty = {name: torch.empty(make.shape, dtype=dtype, device="meta") for name, make in state.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    shards = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        tensors = (state[name]() for name in names)
        if folder is None:
            deque(tensors, maxlen=0)
        else:
            write_tensors(folder / file, {name: empty[name] for name in names}, tensors)
    if folder is not None and shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
