# SPDX-License-Identifier: Apache-2.0
"""Z-Image."""

import torch

from pipeline_one_step import ATTENTION, Family, Grid, chats, masked_states, masked_tokens


ORIGINAL = """
x_embedder = all_x_embedder.2-1
final_layer.linear = all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
noise_refiner.* = noise_refiner.*:
    attention.qkv = attention.to_q attention.to_k attention.to_v
    attention.q_norm = attention.norm_q
    attention.k_norm = attention.norm_k
    attention.out = attention.to_out.0
context_refiner.* = context_refiner.*:
    attention.qkv = attention.to_q attention.to_k attention.to_v
    attention.q_norm = attention.norm_q
    attention.k_norm = attention.norm_k
    attention.out = attention.to_out.0
layers.* = layers.*:
    attention.qkv = attention.to_q attention.to_k attention.to_v
    attention.q_norm = attention.norm_q
    attention.k_norm = attention.norm_k
    attention.out = attention.to_out.0
"""  # layers, see `diff_instruct/export/original.py`


class ZImage(Family):
    """Z-Image: a transformer over the tokens of image and prompt (Qwen3's states of a chat); x0 − ε, time runs up."""

    name = "ZImagePipeline"
    unguided = {"guidance_scale": 0.0}
    lora_targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    apps = {
        "original": ORIGINAL,
        "architecture": "lumina2",
        "encoder": ("CLIPLoader", "lumina2", "qwen_3_4b.safetensors"),
        "latent": "EmptySD3LatentImage",
        "vae": "ae.safetensors",
        "stable_diffusion_cpp": "--llm qwen_3_4b.safetensors --vae ae.safetensors",
    }
    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        return masked_states(pipe, chats(pipe, prompt, enable_thinking=True))

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        time, images = (pipe.schedule.steps - t) / pipe.schedule.steps, list(x_t.unsqueeze(2).unbind())
        output = network(images, time, masked_tokens(c, x_t.dtype), return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return Grid(network.in_channels, factor, 2 * factor, 128 * factor)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": alpha - 1}  # c + g (c − ∅)
