# SPDX-License-Identifier: Apache-2.0
"""SDXL."""

import torch

from pipeline_one_step import Family, device_of


class StableDiffusionXL(Family):
    """SDXL: a UNet that attends to the states of two CLIPs, and is conditioned on a pooled one and on the size."""

    name = "StableDiffusionXLPipeline"
    denoiser = "unet"
    flow = False
    timestep = 399  # σ/α = 1.2, as in DMD2
    unused = ("feature_extractor", "image_encoder")
    unguided = {"guidance_scale": 0}
    apps = {
        "betas": ("scaled_linear", 0.00085, 0.012),
        "single_file": True,
        "half_overflows": True,
        "task": "stable-diffusion-xl",
        "stable_diffusion_cpp": "",
    }
    conditions = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        states = []
        for tokenizer, text_encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
            output = text_encoder(tokens.input_ids.to(device_of(text_encoder)), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": output.text_embeds}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        height, width = (n * pipe.grid.factor for n in x_t.shape[-2:])
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x_t.device)
        return network(
            x_t,
            t,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            added_cond_kwargs={"text_embeds": c["text_embeds"].to(x_t.dtype), "time_ids": size.repeat(len(x_t), 1)},
            return_dict=False,
        )[0]

    @staticmethod
    def original_text_encoders(pipe):
        """Text encoder to (layout, prefix) in a file of the original layout."""
        return {
            "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
            "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
        }
