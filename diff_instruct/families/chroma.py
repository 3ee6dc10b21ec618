# SPDX-License-Identifier: Apache-2.0
"""Chroma."""

import torch

from diff_instruct.families.flux import Flux
from pipeline_one_step import (
    Family,
    positions,
    tokenize,
    unpack,
)


class Chroma(Flux):
    """Chroma: FLUX.1 without CLIP and guidance as an input, whose attention knows T5's padding."""

    name = "ChromaPipeline"
    apps = {
        **Flux.apps,
        "original": Flux.apps["original"]
        + """
distilled_guidance_layer.norms.*.scale = distilled_guidance_layer.norms.*.weight
distilled_guidance_layer.layers.* = distilled_guidance_layer.layers.*:
    in_layer = linear_1
    out_layer = linear_2
""",
        "encoder": ("CLIPLoader", "chroma", "t5xxl_fp16.safetensors"),
        "stable_diffusion_cpp": "--t5xxl t5xxl_fp16.safetensors --vae ae.safetensors",
    }
    unguided = {"guidance_scale": 1.0}
    embedded_guidance = None
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    guide = staticmethod(Family.guide)

    @staticmethod
    def encode_prompt(pipe, prompt):
        """The mask is of floats, 1 for the prompt and the first token of padding: the stock adds it to attention's
        logits, so that the rest of the padding counts less but counts."""
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, pipe.config.max_sequence_length)
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        place = torch.arange(embeds.shape[1], device=embeds.device)
        mask = place <= tokens.attention_mask.sum(dim=1, keepdim=True)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.to(embeds.dtype)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c, mask = (c[k].to(x_t.dtype) for k in ("encoder_hidden_states", "encoder_attention_mask"))
        (b, _, height, width), tokens = x_t.shape, Chroma.tokens(x_t)
        output = network(
            hidden_states=tokens,
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c,
            txt_ids=torch.zeros(c.shape[1], 3, device=t.device),
            img_ids=positions(height // 2, width // 2, 3, t.device),
            attention_mask=torch.cat([mask, mask.new_ones(b, tokens.shape[1])], dim=1),
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def checkpointed(checkpoint):
        """diffusers' network does not hand the mask to its single blocks when it checkpoints them."""
        mask = None

        def with_mask(block, *args):
            nonlocal mask
            if len(args) == 5:  # a double block's; they come first
                mask = args[-1]
            elif len(args) == 3:
                args = (*args, mask)
            return checkpoint(block, *args)

        return with_mask

    @classmethod
    def stock_arguments(cls, pipe):
        return super(Flux, cls).stock_arguments(pipe)
