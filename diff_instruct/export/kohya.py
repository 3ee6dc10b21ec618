"""A LoRA file as ComfyUI, Forge and stable-diffusion.cpp read it."""

import json

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open


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
