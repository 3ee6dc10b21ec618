# SPDX-License-Identifier: Apache-2.0
"""Krea 2."""

import torch

from diff_instruct.families.qwen_image import QwenImage
from pipeline_one_step import ATTENTION, device_of, pack, positions, tokenize, unpack


ORIGINAL = """
first = img_in
tmlp.0 = time_embed.linear_1
tmlp.2 = time_embed.linear_2
tproj.1 = time_mod_proj
txtmlp.0.scale = txt_in.norm.weight
txtmlp.1 = txt_in.linear_1
txtmlp.3 = txt_in.linear_2
txtfusion.projector = text_fusion.projector
last.linear = final_layer.linear
last.norm.scale = final_layer.norm.weight
last.modulation.lin = final_layer.scale_shift_table
txtfusion.layerwise_blocks.* = text_fusion.layerwise_blocks.*:
    attn.wq = attn.to_q
    attn.wk = attn.to_k
    attn.wv = attn.to_v
    attn.wo = attn.to_out.0
    attn.gate = attn.to_gate
    attn.qknorm.qnorm.scale = attn.norm_q.weight
    attn.qknorm.knorm.scale = attn.norm_k.weight
    mlp.gate = ff.gate
    mlp.up = ff.up
    mlp.down = ff.down
    prenorm.scale = norm1.weight
    postnorm.scale = norm2.weight
txtfusion.refiner_blocks.* = text_fusion.refiner_blocks.*:
    attn.wq = attn.to_q
    attn.wk = attn.to_k
    attn.wv = attn.to_v
    attn.wo = attn.to_out.0
    attn.gate = attn.to_gate
    attn.qknorm.qnorm.scale = attn.norm_q.weight
    attn.qknorm.knorm.scale = attn.norm_k.weight
    mlp.gate = ff.gate
    mlp.up = ff.up
    mlp.down = ff.down
    prenorm.scale = norm1.weight
    postnorm.scale = norm2.weight
blocks.* = transformer_blocks.*:
    mod.lin = |scale_shift_table
    attn.wq = attn.to_q
    attn.wk = attn.to_k
    attn.wv = attn.to_v
    attn.wo = attn.to_out.0
    attn.gate = attn.to_gate
    attn.qknorm.qnorm.scale = attn.norm_q.weight
    attn.qknorm.knorm.scale = attn.norm_k.weight
    mlp.gate = ff.gate
    mlp.up = ff.up
    mlp.down = ff.down
    prenorm.scale = norm1.weight
    postnorm.scale = norm2.weight
"""  # layers, see `diff_instruct/export/original.py`


class Krea2(QwenImage):
    """Krea 2: a transformer over the tokens of image and prompt (twelve of Qwen3-VL's states of a chat, without those
    of the system's message), under a mask; latents, VAE and chat are Qwen-Image's.

    The stock pads a prompt to a fixed length in the middle of the chat. In the transformer prompts have no positions
    and nothing attends to padding, so here its states come last, where they can be left out.
    """

    name = "Krea2Pipeline"
    renormalised = None
    unguided = {"guidance_scale": 0.0}
    lora_targets = (*ATTENTION, "to_gate", "ff.gate", "ff.up", "ff.down")
    null_prompt = ""
    left_out = "text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"  # twelve states of each token
    apps = {
        "original": ORIGINAL,
        "encoder": ("CLIPLoader", "krea2", "qwen3vl_4b_fp8_scaled.safetensors"),
        "latent": "EmptySD3LatentImage",
        "vae": "qwen_image_vae.safetensors",
        "stable_diffusion_cpp": "--llm qwen3vl_4b.safetensors --vae qwen_image_vae.safetensors",
    }
    layers = tuple(range(2, 36, 3))  # of the text encoder, whose states are taken
    assumed = {"text_encoder_select_layers": [*layers], "patch_size": 2}

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        before, after = cls.template.split("{}")
        end = pipe.tokenizer([after] * len(prompt), return_tensors="pt").to(device_of(pipe.text_encoder))
        length = cls.before + pipe.config.max_sequence_length - end.input_ids.shape[1]
        chat = tokenize(pipe.tokenizer, pipe.text_encoder, [before + p for p in prompt], length)
        tokens, mask = (torch.cat([chat[k], end[k]], dim=1) for k in ("input_ids", "attention_mask"))
        options = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1), "attention_mask": mask}
        states = pipe.text_encoder(tokens, **options, output_hidden_states=True).hidden_states
        states = torch.stack([states[k][:, cls.before :] for k in cls.layers], dim=2)
        mask = mask[:, cls.before :]
        order = mask.argsort(dim=1, descending=True, stable=True)
        states = states.gather(1, order[..., None, None].expand_as(states))
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask.gather(1, order)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        mask, c = c["encoder_attention_mask"], c["encoder_hidden_states"].to(x_t.dtype)
        place = positions(x_t.shape[2] // 2, x_t.shape[3] // 2, 3, t.device)
        output = network(
            hidden_states=pack(x_t),
            encoder_hidden_states=c,
            timestep=(t / pipe.schedule.steps).to(x_t.dtype),
            position_ids=torch.cat([place.new_zeros(c.shape[1], 3), place]),
            encoder_attention_mask=mask.bool(),
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": alpha - 1, "negative_prompt": [""] * n}  # c + g (c − ∅)
