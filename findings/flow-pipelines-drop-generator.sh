#!/usr/bin/env bash
# With a stochastic scheduler, pipelines of flow models draw noise that the `generator=` they were given does not seed.
#
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, accelerate 1.15.0 (Python 3.11).
#
# Few-step LoRAs of flow models are sampled with FlowMatchLCMScheduler, or FlowMatchEulerDiscreteScheduler with
# `stochastic_sampling=True`: between two steps they add fresh noise, and their `step` takes a `generator`. Pipelines of
# UNets hand theirs on, so one expects `pipe(..., generator=torch.Generator().manual_seed(0))` to give one picture here
# too. FluxPipeline hands it to the first latents only, and `step` falls back on PyTorch's global generator: the same
# seed gives another picture in each call, with no warning. One step, or the usual deterministic scheduler, hides it.
# `torch.manual_seed` before the call makes it repeatable. The loops of Stable Diffusion 3, Qwen-Image, Z-Image, Lumina 2
# and Chroma call `step` in the same way.
#
# Seen (largest difference of the latents of two calls with the same seed, 4 steps):
#   FLUX, FlowMatchEulerDiscreteScheduler:              0.0000
#   FLUX, the same with stochastic_sampling=True:       2.9254
#   FLUX, FlowMatchLCMScheduler:                        2.8642
#   FLUX, FlowMatchLCMScheduler, torch.manual_seed too: 0.0000
#   Stable Diffusion, LCMScheduler:                     0.0000

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)


torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0)
transformer = FluxTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
)
absent = dict(text_encoder=None, tokenizer=None)
flux = FluxPipeline(
    FlowMatchEulerDiscreteScheduler(), vae, **absent, text_encoder_2=None, tokenizer_2=None, transformer=transformer
)
stable = StableDiffusionPipeline(
    vae, **absent, unet=unet, scheduler=LCMScheduler(steps_offset=1), safety_checker=None, feature_extractor=None,
    requires_safety_checker=False,
)
text, pooled = torch.randn(1, 5, 16), torch.randn(1, 16)


def difference(title, pipe, scheduler, seed_torch=False, **options):
    """The largest difference of two calls with the same `generator=`."""
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for _ in range(2):
        if seed_torch:
            torch.manual_seed(1)
        options["generator"] = torch.Generator().manual_seed(0)
        drawn.append(pipe(prompt_embeds=text, num_inference_steps=4, output_type="latent", **options).images)
    result = (drawn[0] - drawn[1]).abs().max().item()
    print(f"{title + ':':51} {result:.4f}")
    return result


of_flux = dict(pooled_prompt_embeds=pooled, height=16, width=16)
stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
usual = difference("FLUX, FlowMatchEulerDiscreteScheduler", flux, FlowMatchEulerDiscreteScheduler(), **of_flux)
euler = difference("FLUX, the same with stochastic_sampling=True", flux, stochastic, **of_flux)
lcm = difference("FLUX, FlowMatchLCMScheduler", flux, FlowMatchLCMScheduler(), **of_flux)
seeded = difference("FLUX, FlowMatchLCMScheduler, torch.manual_seed too", flux, FlowMatchLCMScheduler(), True, **of_flux)
unet_lcm = difference("Stable Diffusion, LCMScheduler", stable, stable.scheduler, guidance_scale=1.0)
if usual or seeded or unet_lcm or min(euler, lcm) < 0.1:
    sys.exit("changed: the pipeline's generator now seeds what its scheduler draws")
PYTHON
