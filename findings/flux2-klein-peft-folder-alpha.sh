#!/usr/bin/env bash
# FLUX.2 klein takes a LoRA folder that peft wrote, and forgets lora_alpha.
#
# Versions: torch 2.13.0, diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0 (Python 3.11).
#
# A LoRA is trained with peft (r=4, lora_alpha=8) and written with peft's `save_pretrained`: adapter_model.safetensors
# and, beside it, adapter_config.json, where alpha stands. One expects `Flux2KleinPipeline.load_lora_weights(folder)`
# either to refuse the folder or to act as the trained network does. It recognises peft's keys, never opens
# adapter_config.json, and takes alpha = r: the LoRA acts at r / lora_alpha of its strength, with no warning. With
# lora_alpha = r it is exact, so a test with that usual default sees nothing.
#
# Seen:
#   lora_alpha 4, r 4: acts at 1.0000 of its strength, remainder 0.0e+00
#   lora_alpha 8, r 4: acts at 0.5000 of its strength, remainder 3.5e-08

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import copy
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig, get_peft_model


def strength(folder, alpha):
    """The factor at which the loaded LoRA changes the weights, relative to peft's own merge of it."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )
    base = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    targets = ["attn.to_q", "attn.to_k", "attn.to_v"]
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(transformer), config)
    trained.save_pretrained(folder)
    trained = trained.merge_and_unload().state_dict()

    pipe = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    loaded = pipe.transformer.state_dict()

    wanted = torch.cat([(trained[name] - base[name]).flatten() for name in base])
    got = torch.cat([(loaded[name] - base[name]).flatten() for name in base])
    factor = (got @ wanted / (wanted @ wanted)).item()
    remainder = ((got - factor * wanted).norm() / wanted.norm()).item()
    print(f"lora_alpha {alpha}, r 4: acts at {factor:.4f} of its strength, remainder {remainder:.1e}")
    return factor


same = strength(f"{sys.argv[1]}/same", 4)
double = strength(f"{sys.argv[1]}/double", 8)
if abs(same - 1) > 1e-4 or abs(double - 0.5) > 1e-4:
    sys.exit("changed: the LoRA no longer acts at r / lora_alpha of its strength")
PYTHON
