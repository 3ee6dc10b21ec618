# SPDX-License-Identifier: Apache-2.0
"""FLUX.1."""

import torch

from pipeline_one_step import (
    CONTEXT_FEED_FORWARD,
    FEED_FORWARD,
    JOINT_ATTENTION,
    Family,
    Grid,
    layers,
    pack,
    positions,
    tokenize,
    unpack,
)


class Flux(Family):
    """FLUX.1: a transformer over the tokens of image and prompt (T5's states, padding included), with CLIP's pooled
    state; dev takes guidance as an input."""

    name = "FluxPipeline"
    unused = ("feature_extractor", "image_encoder")
    unguided = {}  # by default; its guidance is embedded
    lora_targets = layers(
        (*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD, "proj_mlp"),
        r"single_transformer_blocks\.\d+\.proj_out",
    )
    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    embedded_guidance = 3.5

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt)
        pooled = pipe.text_encoder(tokens.input_ids).pooler_output
        tokens = tokenize(pipe.tokenizer_2, pipe.text_encoder_2, prompt, pipe.config.max_sequence_length)
        return {"encoder_hidden_states": pipe.text_encoder_2(tokens.input_ids)[0], "pooled_projections": pooled}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c, guidance = {k: v.to(x_t.dtype) for k, v in c.items()}, pipe.config.embedded_guidance
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            guidance=None if guidance is None else torch.full((len(t),), guidance, device=t.device),
            txt_ids=torch.zeros(c["encoder_hidden_states"].shape[1], 3, device=t.device),
            img_ids=positions(x_t.shape[2] // 2, x_t.shape[3] // 2, 3, t.device),
            return_dict=False,
            **c,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return Grid(network.in_channels // 4, factor, 2 * factor, 128 * factor)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": embedded, "true_cfg_scale": alpha, "negative_prompt": [""] * n}

    tokens = staticmethod(pack)
    from_tokens = staticmethod(unpack)

    @staticmethod
    def stock_latents(z, sigma=1.0):
        return pack(z)

    @classmethod
    def stock_arguments(cls, pipe):
        return {**super().stock_arguments(pipe), "guidance_scale": pipe.config.embedded_guidance or 0.0}
