# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 klein."""

import torch

from pipeline_one_step import JOINT_ATTENTION, Family, Grid, chats, layers, positions, tokenize


class Flux2Klein(Family):
    """FLUX.2 klein: a transformer over the tokens of image and prompt (three of Qwen3's states of a chat, padding
    included). A latent is a 2×2 patch of the VAE's, normalised by the VAE's batch statistics."""

    name = "Flux2KleinPipeline"
    lora_targets = layers(
        (*JOINT_ATTENTION, "linear_in", "linear_out", "to_qkv_mlp_proj"),
        r"single_transformer_blocks\.\d+\.attn\.to_out",
    )
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
        (b, _, height, width), c = x_t.shape, c["encoder_hidden_states"].to(x_t.dtype)
        txt_ids = torch.zeros(b, c.shape[1], 4, device=t.device)
        txt_ids[..., 3] += torch.arange(c.shape[1], device=t.device)
        output = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            guidance=None,
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
    def decode(pipe, x0):
        statistics, (b, c, h, w) = pipe.vae.bn, x0.shape
        std = (statistics.running_var.to(x0) + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        x0 = (x0 * std + statistics.running_mean.to(x0).view(1, -1, 1, 1)).view(b, c // 4, 2, 2, h, w)
        latents = x0.permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]

    @staticmethod
    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    @staticmethod
    def from_tokens(tokens, shape):
        return tokens.transpose(1, 2).reshape(shape)
