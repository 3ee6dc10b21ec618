# SPDX-License-Identifier: Apache-2.0
"""HunyuanImage 2.1."""

import re

import torch

from pipeline_one_step import (
    CONTEXT_FEED_FORWARD,
    FEED_FORWARD,
    JOINT_ATTENTION,
    Family,
    Grid,
    device_of,
    layers,
    tokenize,
)


class HunyuanImage(Family):
    """HunyuanImage 2.1: a transformer over the tokens of image, prompt (Qwen2.5-VL's states) and of the texts that it
    quotes (ByT5's), under masks."""

    name = "HunyuanImagePipeline"
    unguided = {}  # without a guider
    lora_targets = layers(
        (*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD, "proj_mlp"),
        r"single_transformer_blocks\.\d+\.proj_out",
    )
    max_sequence_length = 1000
    conditions = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
        "encoder_hidden_states_2": "prompt_embeds_2",
        "encoder_attention_mask_2": "prompt_attention_mask_2",
    }
    template = (  # what the model was trained with, 34 tokens before the prompt
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
    )
    before = 34
    quotes = (r"\'(.*?)\'", r"\"(.*?)\"", "‘(.*?)’", "“(.*?)”")

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        length = pipe.config.max_sequence_length + cls.before
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, [cls.template.format(p) for p in prompt], length)
        options = {"attention_mask": tokens.attention_mask, "output_hidden_states": True}
        states = pipe.text_encoder(tokens.input_ids, **options).hidden_states[-3]
        c = {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask}
        states, mask = zip(*(cls.encode_quoted(pipe, p) for p in prompt))
        c = {k: v[:, cls.before :] for k, v in c.items()}
        return {**c, "encoder_hidden_states_2": torch.cat(states), "encoder_attention_mask_2": torch.cat(mask)}

    @classmethod
    def encode_quoted(cls, pipe, prompt):
        """States and mask, one row, of what a prompt quotes; zeros if that is nothing."""
        texts = [text for quote in cls.quotes for text in re.findall(quote, prompt)]
        encoder, length = pipe.text_encoder_2, 128
        if not texts:
            states = torch.zeros(1, length, encoder.config.d_model, dtype=encoder.dtype, device=device_of(encoder))
            return states, torch.zeros(1, length, dtype=torch.int64, device=states.device)
        quoted = "".join(f'Text "{text}". ' for text in texts)
        tokens = tokenize(pipe.tokenizer_2, encoder, [quoted], length)
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask.float())[0], tokens.attention_mask

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c = {k: v.to(x_t.dtype) if v.is_floating_point() else v for k, v in c.items()}
        return network(hidden_states=x_t, timestep=t.to(x_t.dtype), **c, return_dict=False)[0]

    @staticmethod
    def grid(network, vae):
        factor = vae.spatial_compression_ratio
        return Grid(network.in_channels, factor, factor * network.patch_size[0], 64 * factor)

    @staticmethod
    def guide(alpha, embedded, n):
        return {}

    @staticmethod
    def set_guidance(stock, alpha):
        """What the published guiders do beside it, projection and momentum, is not what is trained against."""
        from diffusers import ClassifierFreeGuidance

        stock.guider, stock.ocr_guider = ClassifierFreeGuidance(guidance_scale=alpha), None

    @staticmethod
    def unsupported(network):
        if network.use_meanflow:
            return "predicts means over steps (MeanFlow: HunyuanImage-2.1-Distilled), not x̂0; give the base model"
