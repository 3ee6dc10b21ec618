"""A LoRA file as ComfyUI, Forge and stable-diffusion.cpp read it."""

import json

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open

from diff_instruct.export.original import original_layout


def read(file):
    """(weights, metadata) of diffusers' LoRA file."""
    with safe_open(file, framework="pt") as f:
        state = {key: f.get_tensor(key) for key in f.keys()}
        return state, json.loads((f.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))


def kohya_lora(file):
    """The weights of diffusers' LoRA file `file` by kohya's names, with the alpha that it was trained with.

    diffusers writes alpha = rank; the LoRA's own is in the metadata of its file, and without it the programs would
    apply the LoRA alpha / rank times too weakly or too strongly.
    """
    state, metadata = read(file)
    kohya = convert_state_dict_to_kohya(convert_unet_state_dict_to_peft(state))
    alpha = metadata.get("unet.lora_alpha")
    if alpha is not None:
        kohya |= {key: torch.tensor(float(alpha)) for key in kohya if key.endswith(".alpha")}
    return kohya


def folded_lora(file):
    """The weights of diffusers' LoRA file `file` of a transformer by their own names, alpha / rank multiplied in.

    ComfyUI and stable-diffusion.cpp read these names of transformers, but not the metadata that says alpha. They do
    read an `.alpha` beside each pair, but there diffusers' loaders of most families stop. So nothing is left to say.
    """
    state, metadata = read(file)
    alpha = metadata.get("transformer.lora_alpha")
    for key in [key for key in state if ".lora_A." in key and alpha is not None]:
        other = key.replace(".lora_A.", ".lora_B.")
        state[other] = state[other].float() * (alpha / len(state[key]))
    return state


def original_lora(file, network, table):
    """The weights of diffusers' LoRA file `file` by the original names of a transformer's layers, after ComfyUI's
    prefix, alpha / rank multiplied in.

    Where layers are one in the original layout, so are their pairs: the rows of their A below each other, and B with
    a block of columns for each.

    Args:
        network: of the base.
        table: of its names, see `original.py`.
    """
    state, made = folded_lora(file), {}
    for original, part in original_layout(network, table).items():
        pairs = {}
        for key in part.weights:
            layer = f"transformer.{key.removesuffix('.weight')}"
            if f"{layer}.lora_A.weight" in state:
                pairs[key] = state[f"{layer}.lora_A.weight"].float(), state[f"{layer}.lora_B.weight"].float()
        if not pairs:
            continue
        columns, start, blocks = sum(len(a) for a, _ in pairs.values()), 0, {}
        for key, weight in part.weights.items():
            blocks[key] = torch.zeros(len(weight), columns)
            if key in pairs:
                a, b = pairs[key]
                blocks[key][:, start : start + len(a)] = b
                start += len(a)
        name = f"diffusion_model.{original.removesuffix('.weight')}"
        made[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in pairs.values()])
        made[f"{name}.lora_B.weight"] = part.made_of(blocks)
    return made
