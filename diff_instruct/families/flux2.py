# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 dev."""

import torch

from diff_instruct.families.flux2_klein import Flux2Klein
from pipeline_one_step import device_of


class Flux2(Flux2Klein):
    """FLUX.2 dev: klein's transformer with guidance as an input, over three of Mistral's states of a chat, padding
    included. It knows no ∅."""

    name = "Flux2Pipeline"
    has_null = False
    unguided = {}  # its guidance is embedded
    embedded_guidance = 4.0
    apps = {
        **Flux2Klein.apps,
        "encoder": ("CLIPLoader", "flux2", "mistral_3_small_flux2_bf16.safetensors"),
        "stable_diffusion_cpp": "--llm mistral_3_small_flux2_bf16.safetensors --vae flux2-vae.safetensors",
    }
    instruction = (  # what the model was trained with
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation."
    )

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        chats = [  # a prompt cannot name the token of a picture
            [
                {"role": "system", "content": [{"type": "text", "text": cls.instruction}]},
                {"role": "user", "content": [{"type": "text", "text": p.replace("[IMG]", "")}]},
            ]
            for p in prompt
        ]
        options = {"padding": "max_length", "truncation": True, "max_length": pipe.config.max_sequence_length}
        options |= {"add_generation_prompt": False, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        tokens = pipe.tokenizer.apply_chat_template(chats, **options).to(device_of(pipe.text_encoder))
        masked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        states = pipe.text_encoder(**masked, output_hidden_states=True, use_cache=False).hidden_states
        return {"encoder_hidden_states": torch.cat([states[k] for k in (10, 20, 30)], dim=-1)}

    @classmethod
    def from_stock_latents(cls, stock, latents, shape):
        return cls.from_tokens(latents, shape)  # it gives them as they are, klein the VAE's

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": embedded}

    @classmethod
    def stock_arguments(cls, pipe):
        return {**super().stock_arguments(pipe), "guidance_scale": pipe.config.embedded_guidance}
