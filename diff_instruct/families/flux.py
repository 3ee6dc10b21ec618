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


ORIGINAL = """
img_in = x_embedder
txt_in = context_embedder
time_in.in_layer = time_text_embed.timestep_embedder.linear_1
time_in.out_layer = time_text_embed.timestep_embedder.linear_2
vector_in.in_layer = time_text_embed.text_embedder.linear_1
vector_in.out_layer = time_text_embed.text_embedder.linear_2
guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
double_blocks.* = transformer_blocks.*:
    img_mod.lin = norm1.linear
    img_attn.qkv = attn.to_q attn.to_k attn.to_v
    img_attn.proj = attn.to_out.0
    img_attn.norm.query_norm.scale = attn.norm_q.weight
    img_attn.norm.key_norm.scale = attn.norm_k.weight
    img_mlp.0 = ff.net.0.proj
    img_mlp.2 = ff.net.2
    txt_mod.lin = norm1_context.linear
    txt_attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
    txt_attn.proj = attn.to_add_out
    txt_attn.norm.query_norm.scale = attn.norm_added_q.weight
    txt_attn.norm.key_norm.scale = attn.norm_added_k.weight
    txt_mlp.0 = ff_context.net.0.proj
    txt_mlp.2 = ff_context.net.2
single_blocks.* = single_transformer_blocks.*:
    modulation.lin = norm.linear
    linear1 = attn.to_q attn.to_k attn.to_v proj_mlp
    linear2 = proj_out
    norm.query_norm.scale = attn.norm_q.weight
    norm.key_norm.scale = attn.norm_k.weight
"""  # layers, see `diff_instruct/export/original.py`


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
    apps = {
        "original": ORIGINAL,
        "architecture": "flux",
        "encoder": ("DualCLIPLoader", "flux", "t5xxl_fp16.safetensors", "clip_l.safetensors"),
        "latent": "EmptySD3LatentImage",
        "vae": "ae.safetensors",
        "stable_diffusion_cpp": "--clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --vae ae.safetensors",
    }
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
