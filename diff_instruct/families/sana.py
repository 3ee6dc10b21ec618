# SPDX-License-Identifier: Apache-2.0
"""Sana."""

import inspect

import torch

from pipeline_one_step import ATTENTION, Family, Grid, tokenize


class Sana(Family):
    """Sana: a transformer that attends to Gemma's states, under their mask; the instruction before each prompt is the
    stock's, and is cut off again."""

    name = "SanaPipeline"
    options = {"use_resolution_binning": False}
    lora_targets = (*ATTENTION, "ff.conv_inverted", "ff.conv_point")
    max_sequence_length = 300
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        stock_call = inspect.signature(Sana.stock().__call__).parameters
        instruction = "\n".join(stock_call["complex_human_instruction"].default)
        return Sana.encode(pipe, prompt, instruction, len(pipe.tokenizer.encode(instruction)) - 2)

    @classmethod
    def encode_null(cls, pipe):
        return cls.encode(pipe, [""])  # without the instruction

    @staticmethod
    def encode(pipe, prompt, instruction="", length=0):
        kept, prompt = pipe.config.max_sequence_length, [instruction + p.lower().strip() for p in prompt]
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, length + kept)
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        c = {"encoder_hidden_states": embeds, "encoder_attention_mask": tokens.attention_mask}
        return {k: torch.cat([v[:, :1], v[:, 1 - kept :]], dim=1) for k, v in c.items()}

    @staticmethod
    def denoise(pipe, network, x_t, t, c, **options):
        options = options or {"timestep": t * pipe.denoiser.config.timestep_scale}
        mask, c = c["encoder_attention_mask"], c["encoder_hidden_states"].to(x_t.dtype)
        output = network(x_t, encoder_hidden_states=c, encoder_attention_mask=mask, return_dict=False, **options)
        return output[0][:, : x_t.shape[1]]

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.encoder_block_out_channels) - 1)
        return Grid(network.in_channels, factor, factor * network.patch_size, network.sample_size * factor)
