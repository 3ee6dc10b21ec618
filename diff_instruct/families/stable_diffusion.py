# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x."""

from pipeline_one_step import Family, device_of


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: a UNet that attends to all of CLIP's states, without a mask."""

    name = "StableDiffusionPipeline"
    denoiser = "unet"
    flow = False
    timestep = 625  # σ/α = 2.5, as in SiD-LSG
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    unguided = {"guidance_scale": 0}
    apps = {
        "betas": ("scaled_linear", 0.00085, 0.012),
        "single_file": True,
        "task": "stable-diffusion",
        "stable_diffusion_cpp": "",
    }
    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        return {"encoder_hidden_states": pipe.text_encoder(tokens.input_ids.to(device_of(pipe.text_encoder)))[0]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        return network(x_t, t, encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype), return_dict=False)[0]

    @staticmethod
    def original_text_encoders(pipe):
        """Text encoder to (layout, prefix) in a file of the original layout."""
        if pipe.unet.config.cross_attention_dim == 1024:  # Stable Diffusion 2
            return {"text_encoder": ("open_clip", "cond_stage_model.model.")}
        return {"text_encoder": ("clip", "cond_stage_model.transformer.")}
