# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 klein."""

import torch

from pipeline_one_step import JOINT_ATTENTION, Family, Grid, chats, layers, positions, tokenize


ORIGINAL = """
img_in = x_embedder
txt_in = context_embedder
time_in.in_layer = time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer = time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer = time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin = double_stream_modulation_img.linear
double_stream_modulation_txt.lin = double_stream_modulation_txt.linear
single_stream_modulation.lin = single_stream_modulation.linear
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
double_blocks.* = transformer_blocks.*:
    img_attn.qkv = attn.to_q attn.to_k attn.to_v
    img_attn.proj = attn.to_out.0
    img_attn.norm.query_norm.scale = attn.norm_q.weight
    img_attn.norm.key_norm.scale = attn.norm_k.weight
    img_mlp.0 = ff.linear_in
    img_mlp.2 = ff.linear_out
    txt_attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
    txt_attn.proj = attn.to_add_out
    txt_attn.norm.query_norm.scale = attn.norm_added_q.weight
    txt_attn.norm.key_norm.scale = attn.norm_added_k.weight
    txt_mlp.0 = ff_context.linear_in
    txt_mlp.2 = ff_context.linear_out
single_blocks.* = single_transformer_blocks.*:
    linear1 = attn.to_qkv_mlp_proj
    linear2 = attn.to_out
    norm.query_norm.scale = attn.norm_q.weight
    norm.key_norm.scale = attn.norm_k.weight
"""  # layers, see `diff_instruct/export/original.py`


class Flux2Klein(Family):
    """FLUX.2 klein: a transformer over the tokens of image and prompt (three of Qwen3's states of a chat, padding
    included). A latent is a 2×2 patch of the VAE's, normalised by the VAE's batch statistics."""

    name = "Flux2KleinPipeline"
    lora_targets = layers(
        (*JOINT_ATTENTION, "linear_in", "linear_out", "to_qkv_mlp_proj"),
        r"single_transformer_blocks\.\d+\.attn\.to_out",
    )
    apps = {
        "original": ORIGINAL,
        "architecture": "flux",
        "encoder": ("CLIPLoader", "flux2", "qwen_3_4b.safetensors"),
        "latent": "EmptyFlux2LatentImage",
        "vae": "flux2-vae.safetensors",
        "stable_diffusion_cpp": "--llm qwen_3_4b.safetensors --vae flux2-vae.safetensors",
    }
    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        prompt = chats(pipe, prompt, enable_thinking=False)
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, pipe.config.max_sequence_length)
        options = {"attention_mask": tokens.attention_mask, "output_hidden_states": True, "use_cache": False}
        states = pipe.text_encoder(tokens.input_ids, **options).hidden_states
        return {"encoder_hidden_states": torch.cat([states[k] for k in (9, 18, 27)], dim=-1)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        guidance = pipe.config.embedded_guidance  # dev's
        (b, _, height, width), c = x_t.shape, c["encoder_hidden_states"].to(x_t.dtype)
        txt_ids = torch.zeros(b, c.shape[1], 4, device=t.device)
        txt_ids[..., 3] += torch.arange(c.shape[1], device=t.device)
        output = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            guidance=None if guidance is None else torch.full((b,), guidance, device=t.device),
            encoder_hidden_states=c,
            txt_ids=txt_ids,
            img_ids=positions(height, width, 4, t.device).expand(b, -1, -1),
            return_dict=False,
        )
        return output[0].transpose(1, 2).reshape(x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** len(vae.block_out_channels)
        return Grid(network.in_channels, factor, factor, 64 * factor)

    @staticmethod
    def decode(pipe, x0, eps=None):
        statistics, (b, c, h, w) = pipe.vae.bn, x0.shape
        eps = pipe.vae.config.batch_norm_eps if eps is None else eps
        std = (statistics.running_var.to(x0) + eps).sqrt().view(1, -1, 1, 1)
        x0 = (x0 * std + statistics.running_mean.to(x0).view(1, -1, 1, 1)).view(b, c // 4, 2, 2, h, w)
        latents = x0.permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]

    @classmethod
    def from_stock_latents(cls, stock, latents, shape):
        b, c, h, w = shape
        x0 = latents.view(b, c // 4, h, 2, w, 2).permute(0, 1, 3, 5, 2, 4).reshape(shape)
        statistics = stock.vae.bn
        std = (statistics.running_var.to(x0) + stock.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        return (x0 - statistics.running_mean.to(x0).view(1, -1, 1, 1)) / std

    @staticmethod
    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    @staticmethod
    def from_tokens(tokens, shape):
        return tokens.transpose(1, 2).reshape(shape)
