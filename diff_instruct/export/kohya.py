"""A LoRA file in the keys that ComfyUI, Forge and stable-diffusion.cpp read."""

import json

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open


def kohya_lora(file):
    """The weights of diffusers' LoRA file `file` by kohya's names, with the alpha that it was trained with.

    diffusers writes alpha = rank; the LoRA's own is in the metadata of its file, and without it the programs would
    apply the LoRA alpha / rank times too weakly or too strongly.
    """
    with safe_open(file, framework="pt") as f:
        state = {key: f.get_tensor(key) for key in f.keys()}
        metadata = json.loads((f.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    kohya = convert_state_dict_to_kohya(convert_unet_state_dict_to_peft(state))
    alpha = metadata.get("unet.lora_alpha")
    if alpha is not None:
        kohya |= {key: torch.tensor(float(alpha)) for key in kohya if key.endswith(".alpha")}
    return kohya
