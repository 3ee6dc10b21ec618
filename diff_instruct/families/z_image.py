# SPDX-License-Identifier: Apache-2.0
"""Z-Image."""

import torch

from pipeline_one_step import ATTENTION, Family, Grid, chats, masked_states, masked_tokens


class ZImage(Family):
    """Z-Image: a transformer over the tokens of image and prompt (Qwen3's states of a chat); x0 − ε, time runs up."""

    name = "ZImagePipeline"
    unguided = {"guidance_scale": 0.0}
    lora_targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
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
