"""Exports drawn by stable-diffusion.cpp, through its Python binding, on a CPU.

`STABLE_DIFFUSION_CPP_PYTHON=/path/to/python python -m pytest -m apps tests/test_stable_diffusion_cpp.py -s`, with an
environment that has stable-diffusion-cpp-python 0.4.7. Nothing is fetched. That version takes FLUX.1's sizes from the
file, and zeros for T5's states where T5 is not given; UNets, SD3, Z-Image and Qwen-Image have one width there, CLIP
and the VAE one size, all with random weights here.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import export_for_apps
from diff_instruct.export.apps import noise_levels
from diff_instruct.export.export import save_lora
from diff_instruct.export.layouts import clip_state, vae_layout
from diff_instruct.families import FAMILIES
from diff_instruct.models.lora import add_lora, merged
from pipeline_one_step import OneStepPipeline
from tests.whole import randomise, stable_diffusion


pytestmark = pytest.mark.apps
PYTHON, SIDE = os.environ.get("STABLE_DIFFUSION_CPP_PYTHON"), 64
DRAW = """
import json, sys
import stable_diffusion_cpp

for job in json.loads(sys.argv[1]):
    model = stable_diffusion_cpp.StableDiffusion(rng_type="cpu", vae_decode_only=True, n_threads=1, **job["model"])
    model.generate_image(sample_method="lcm", cfg_scale=1.0, **job["call"])[0].save(job["file"])
"""
FLUX = {
    "attention_head_dim": 128, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "in_channels": 64,
    "joint_attention_dim": 4096, "axes_dims_rope": (16, 56, 56), "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
if PYTHON is None:
    pytest.skip(
        "STABLE_DIFFUSION_CPP_PYTHON names no Python with stable-diffusion-cpp-python", allow_module_level=True
    )


EMPTY = [[49406] + [49407] * 76]  # CLIP's tokens of the empty prompt


def clip_of_flux(file):
    """c of the empty prompt by a CLIP with random weights, which is written to a file, and zeros in T5's place."""
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        vocab_size=49408, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    clip = randomise(CLIPTextModel(clip)).half().float()
    save_file({k: v.half().contiguous() for k, v in clip_state(clip).items()}, file)
    with torch.no_grad():
        pooled = clip(torch.tensor(EMPTY)).pooler_output
    return {"encoder_hidden_states": torch.zeros(1, 256, 4096), "pooled_projections": pooled}


def flux():
    """An export with a small network and the published size's VAE, random weights in bfloat16's precision."""
    torch.manual_seed(0)
    network = randomise(FluxTransformer2DModel(**FLUX)).to(torch.bfloat16).float()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",) * 4, scaling_factor=0.3611,
        up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.1159,
    )  # fmt: skip
    parts = dict.fromkeys([*OneStepPipeline._optional_components, "vae"])
    parts |= {"transformer": network, "vae": randomise(vae), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return dim(OneStepPipeline(**parts, timestep=1000, family="FluxPipeline", sizes=[[SIDE, SIDE]]))


def dim(pipe):
    """With pictures that are seldom black or white."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight *= 0.5
    return pipe


def compare(pipe, c, jobs, folder):
    """Largest and mean difference, of 255, of what each job draws.

    Args:
        jobs: {name: (expected picture, arguments of the model, prompt)}.
    """
    call = {"width": SIDE, "height": SIDE, "seed": 42, "sigmas": noise_levels(pipe).text(), "sample_steps": 1}
    call |= {"guidance": pipe.config.embedded_guidance} if pipe.config.embedded_guidance else {}
    listed = [
        {"model": model, "call": {**call, "prompt": prompt}, "file": f"{folder}/{name}.png"}
        for name, (_, model, prompt) in jobs.items()
    ]
    subprocess.run([PYTHON, "-c", DRAW, json.dumps(listed)], check=True)
    found = {}
    for name, (expected, *_) in jobs.items():
        gap = abs(255 * expected - np.asarray(Image.open(folder / f"{name}.png").convert("RGB")))
        found[name] = gap.max().item(), gap.mean().item()
    return found


def draw(pipe, c):
    z = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(42))
    return pipe(prompt_embeds=c, latents=z, output_type="np").images[0]


def test_flux(tmp_path):
    """The network in bfloat16, with a LoRA file of alpha three times its rank, and as GGUF."""
    pipe, c, family = flux(), clip_of_flux(tmp_path / "clip_l.safetensors"), FAMILIES["FluxPipeline"]
    plain = draw(pipe, c)
    export_for_apps.write(pipe, tmp_path, tmp_path, "flux", ["network", "gguf"], "fire", ["q8_0", "q4_0"])
    state = {k.partition(".")[2]: v.contiguous() for k, v in vae_layout(pipe.vae).items()}
    save_file(state, tmp_path / "vae.safetensors")
    adapted = add_lora(pipe.transformer, "generator", 2, 6, family.lora_targets)
    for key, p in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    save_lora(tmp_path, family, adapted)
    state, pipe = {k: make() for k, make in merged(adapted, "generator").items()}, flux()
    export_for_apps.write(pipe, tmp_path, tmp_path, "flux", ["lora"], "fire")
    pipe.transformer.load_state_dict(state)
    with_lora = draw(pipe, c)

    def model(end):
        files = {
            "diffusion_model_path": f"flux_transformer{end}",
            "vae_path": "vae.safetensors",
            "clip_l_path": "clip_l.safetensors",
            "lora_model_dir": ".",
        }
        return {k: str(tmp_path / v) for k, v in files.items()}

    found = compare(pipe, c, {
        "bfloat16": (plain, model(".safetensors"), ""),
        "LoRA": (with_lora, model(".safetensors"), "<lora:flux_lora:1>"),
        "q8_0": (plain, model("_q8_0.gguf"), ""),
        "q4_0": (plain, model("_q4_0.gguf"), ""),
    }, tmp_path)  # fmt: skip
    changed = 255 * abs(with_lora - plain).max()
    print(f"\nFLUX.1: {found}; the LoRA changes {changed}, deviation {255 * plain.std()}")
    assert found["bfloat16"][0] < 2 and found["LoRA"][0] < 2 and changed > 10
    assert found["q8_0"][1] < 1 and found["q4_0"][1] < 10


def test_stable_diffusion_at_full_size(tmp_path):
    """The whole file of an export that was trained on scaled noise."""
    pipe = dim(stable_diffusion(input_noise="scaled", sizes=[[SIDE, SIDE]]))
    export_for_apps.write(pipe, None, tmp_path, "apples", ["single_file"], "fire")
    pipe.to(torch.float32)
    with torch.no_grad():
        c = {"encoder_hidden_states": pipe.text_encoder(torch.tensor(EMPTY))[0]}
    expected = draw(pipe, c)
    found = compare(pipe, c, {"whole": (expected, {"model_path": str(tmp_path / "apples.safetensors")}, "")}, tmp_path)
    print(f"\nStable Diffusion 1.5: {found}, deviation {255 * expected.std()}")
    assert found["whole"][0] < 2
