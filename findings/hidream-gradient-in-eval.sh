#!/usr/bin/env bash
# HiDream's transformer returns wrong gradients wherever its output has the shape of a latent.
#
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0 (Python 3.11).
#
# One expects `eval()` to change dropout and the like, not the derivative. In `eval()` the routed experts of
# HiDreamImageTransformer2DModel run under `no_grad`: the output is right, `backward()` succeeds, and the gradient
# at the input lacks every path through the experts; the experts and their gates get none at all. That breaks reward
# gradients, guidance by gradients and distillation through a frozen teacher, without an error. `train()` alone
# has the right gradient but returns patches instead of a latent, and `force_inference_output=True`, which gives
# `train()` the latent's shape, brings the wrong gradient with it. The derivative along a direction is compared with
# central differences, in float64.
#
# Seen:
#   eval(): shape (1, 4, 8, 8), autograd 4.8865, differences -3.9714, 26 of 86 parameters without gradient
#   train(), force_inference_output: shape (1, 4, 8, 8), autograd 4.8865, differences -3.9714, 26 of 86 parameters
#       without gradient
#   train(): shape (1, 4, 16, 4), autograd -7.8812, differences -7.8812, 0 of 86 parameters without gradient

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import HiDreamImageTransformer2DModel


def directional(force_inference_output, training):
    """The derivative of a linear function of the output along a direction: (autograd's, by differences)."""
    torch.manual_seed(0)
    network = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1],
        force_inference_output=force_inference_output,
    ).double().train(training)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    torch.manual_seed(1)
    latent, direction, weight = (torch.randn(1, 4, 8, 8).double() for _ in range(3))
    condition = {
        "timesteps": torch.tensor([500]),
        "encoder_hidden_states_t5": torch.randn(1, 6, 16).double(),
        "encoder_hidden_states_llama3": torch.randn(2, 1, 6, 16).double(),
        "pooled_embeds": torch.randn(1, 16).double(),
    }

    def function(x):
        output = network(x, **condition).sample
        return (output * weight.reshape(output.shape)).sum(), tuple(output.shape)

    x = latent.clone().requires_grad_()
    value, shape = function(x)
    value.backward()
    autograd = (x.grad * direction).sum().item()
    with torch.no_grad():
        h = 1e-5
        differences = (function(latent + h * direction)[0] - function(latent - h * direction)[0]).item() / (2 * h)
    parameters = list(network.parameters())
    without = sum(parameter.grad is None for parameter in parameters)
    name = ("train()" if training else "eval()") + (", force_inference_output" if force_inference_output else "")
    print(f"{name}: shape {shape}, autograd {autograd:.4f}, differences {differences:.4f}, "
          f"{without} of {len(parameters)} parameters without gradient")
    return abs(autograd - differences) / abs(differences), without


evaluated, forced, trained = directional(False, False), directional(True, True), directional(False, True)
wrong = [error > 0.05 and without > 0 for error, without in (evaluated, forced)]
if not all(wrong) or trained[0] > 1e-3 or trained[1]:
    sys.exit("changed: the gradient is no longer wrong in eval() and under force_inference_output, or is in train()")
PYTHON
