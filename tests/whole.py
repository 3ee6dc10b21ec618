"""Stable Diffusion 1.5 at its full size with random weights, for programs that take no other."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline_one_step import OneStepPipeline


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures" / "stable-diffusion-v1-5"


def randomise(network):
    """Its weights drawn anew, so that layers keep the size of what they are given."""
    for key, p in network.eval().named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        torch.nn.init.normal_(p, mean=1.0 if "norm" in key and key.endswith("weight") else 0.0, std=scale)
    return network


def stable_diffusion(tokenizer=None, **options):
    """A `OneStepPipeline` in half precision at t* = 625; options are its own."""
    torch.manual_seed(0)
    parts = dict.fromkeys([*OneStepPipeline._optional_components, "vae"])
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        parts[name] = randomise(cls.from_config(cls.load_config(FOLDER / name)).half())
    parts["text_encoder"] = randomise(CLIPTextModel(CLIPTextConfig.from_pretrained(FOLDER / "text_encoder")).half())
    parts["tokenizer"] = tokenizer
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return OneStepPipeline(**parts, scheduler=scheduler, timestep=625, family="StableDiffusionPipeline", **options)
