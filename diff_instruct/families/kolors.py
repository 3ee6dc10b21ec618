# SPDX-License-Identifier: Apache-2.0
"""Kolors."""

from diff_instruct.families.stable_diffusion_xl import StableDiffusionXL
from pipeline_one_step import device_of


class Kolors(StableDiffusionXL):
    """Kolors: SDXL's UNet that attends to ChatGLM's states, padding included, and is conditioned on the last one."""

    name = "KolorsPipeline"
    max_sequence_length = 256
    apps = None

    @staticmethod
    def encode_prompt(pipe, prompt):
        """Padding is on the left, so the last state is the prompt's."""
        length, options = pipe.config.max_sequence_length, {"padding": "max_length", "truncation": True}
        tokens = pipe.tokenizer(prompt, max_length=length, return_tensors="pt", **options)
        states = pipe.text_encoder(**tokens.to(device_of(pipe.text_encoder)), output_hidden_states=True).hidden_states
        return {"encoder_hidden_states": states[-2].transpose(0, 1), "text_embeds": states[-1][-1]}
