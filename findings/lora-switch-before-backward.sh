#!/usr/bin/env bash
# Switching the LoRA adapter between forward and backward loses the gradient that was already recorded.
#
# Versions: torch 2.13.0, diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0 (Python 3.11).
#
# Distillation keeps two adapters on one base: a generator's and a fake score's. One expects the graph of a loss to
# belong to the adapter that was active in the forward, as autograd's graphs do: to set the other adapter before
# `backward()` should change nothing, or raise. But `set_adapter` also sets `requires_grad=False` on the adapter that
# it leaves, and autograd asks the leaves at the time of `backward()`: the call succeeds, the loss is right, and no
# parameter of either adapter gets a gradient, so the optimizer's step does nothing. Gradient checkpointing is off
# here. Setting the first adapter again before `backward()` gives the full gradient.
#
# Seen:
#   backward at once:              norm of the generator's gradient 0.071739, 32 of 64 LoRA parameters without one
#   fake score set in between:     norm of the generator's gradient 0.000000, 64 of 64 LoRA parameters without one
#   generator set again in time:   norm of the generator's gradient 0.071739, 32 of 64 LoRA parameters without one

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
).requires_grad_(False)
for name in ("fake_score", "generator"):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
latent, text, timestep = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([500])


def gradient(*adapters_before_backward):
    """The norm of the generator's gradient, and how many of both adapters' parameters have none."""
    unet.zero_grad(set_to_none=True)
    unet.set_adapter("generator")
    loss = unet(latent, timestep, text).sample.square().mean()
    for name in adapters_before_backward:
        unet.set_adapter(name)
    loss.backward()
    own = [p.grad for name, p in unet.named_parameters() if ".generator." in name]
    both = [p.grad for name, p in unet.named_parameters() if "lora_" in name]
    norm = sum(g.square().sum().item() for g in own if g is not None) ** 0.5
    return norm, sum(g is None for g in both), len(both)


at_once, switched, restored = gradient(), gradient("fake_score"), gradient("fake_score", "generator")
for title, (norm, none, count) in (
    ("backward at once:", at_once),
    ("fake score set in between:", switched),
    ("generator set again in time:", restored),
):
    print(f"{title:30} norm of the generator's gradient {norm:.6f}, {none} of {count} LoRA parameters without one")
if at_once[0] == 0 or switched[0] != 0 or switched[1] != switched[2] or abs(restored[0] / at_once[0] - 1) > 1e-4:
    sys.exit("changed: a switch of the adapter before backward no longer loses the gradient")
PYTHON
