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


ORIGINAL = """
img_in.proj = x_embedder.proj
txt_in.input_embedder = context_embedder.proj_in
txt_in.t_embedder.in_layer = context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.out_layer = context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.c_embedder.in_layer = context_embedder.time_text_embed.text_embedder.linear_1
txt_in.c_embedder.out_layer = context_embedder.time_text_embed.text_embedder.linear_2
byt5_in.layernorm = context_embedder_2.norm
byt5_in.fc1 = context_embedder_2.linear_1
byt5_in.fc2 = context_embedder_2.linear_2
byt5_in.fc3 = context_embedder_2.linear_3
time_in.in_layer = time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer = time_guidance_embed.timestep_embedder.linear_2
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
txt_in.individual_token_refiner.blocks.* = context_embedder.token_refiner.refiner_blocks.*:
    norm1 = norm1
    norm2 = norm2
    self_attn.qkv = attn.to_q attn.to_k attn.to_v
    self_attn.proj = attn.to_out.0
    mlp.0 = ff.net.0.proj
    mlp.2 = ff.net.2
    adaLN_modulation.1 = norm_out.linear
double_blocks.* = transformer_blocks.*:
    img_mod.lin = norm1.linear
    img_attn.qkv = attn.to_q attn.to_k attn.to_v
    img_attn.proj = attn.to_out.0
    img_attn.norm.query_norm = attn.norm_q
    img_attn.norm.key_norm = attn.norm_k
    img_mlp.0 = ff.net.0.proj
    img_mlp.2 = ff.net.2
    txt_mod.lin = norm1_context.linear
    txt_attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
    txt_attn.proj = attn.to_add_out
    txt_attn.norm.query_norm = attn.norm_added_q
    txt_attn.norm.key_norm = attn.norm_added_k
    txt_mlp.0 = ff_context.net.0.proj
    txt_mlp.2 = ff_context.net.2
single_blocks.* = single_transformer_blocks.*:
    modulation.lin = norm.linear
    linear1 = attn.to_q attn.to_k attn.to_v proj_mlp
    linear2 = proj_out
    norm.query_norm = attn.norm_q
    norm.key_norm = attn.norm_k
"""  # layers as ComfyUI calls them, see `diff_instruct/export/original.py`


class HunyuanImage(Family):
    """HunyuanImage 2.1: a transformer over the tokens of image, prompt (Qwen2.5-VL's states) and of the texts that it
    quotes (ByT5's), under masks."""

    name = "HunyuanImagePipeline"
    unguided = {}  # without a guider
    lora_targets = layers(
        (*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD, "proj_mlp"),
        r"single_transformer_blocks\.\d+\.proj_out",
    )
    apps = {
        "original": ORIGINAL,
        "architecture": "hyvid",
        "encoder": (
            "DualCLIPLoader",
            "hunyuan_image",
            "qwen_2.5_vl_7b.safetensors",
            "byt5_small_glyphxl_fp16.safetensors",
        ),
        "latent": "EmptyHunyuanImageLatent",
        "vae": "hunyuan_image_2.1_vae_fp16.safetensors",
    }
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
