# SPDX-License-Identifier: Apache-2.0
"""Ovis-Image."""

import torch

from diff_instruct.families.flux import Flux
from pipeline_one_step import (
    Family,
    chats,
    positions,
    tokenize,
    unpack,
)


class OvisImage(Flux):
    """Ovis-Image: a transformer like FLUX.1's over the tokens of image and prompt (Qwen3's last states of a chat,
    without those of the instruction; padding is zero and attended to)."""

    name = "OvisImagePipeline"
    apps = {
        **Flux.apps,
        "original": Flux.apps["original"].replace("_norm.scale", "_norm.weight")
        + """
time_in.in_layer = timestep_embedder.linear_1
time_in.out_layer = timestep_embedder.linear_2
txt_norm = context_embedder_norm
double_blocks.* = transformer_blocks.*:
    img_mlp.up_proj img_mlp.gate_proj = ff.net.0.proj
    img_mlp.down_proj = ff.net.2
    txt_mlp.up_proj txt_mlp.gate_proj = ff_context.net.0.proj
    txt_mlp.down_proj = ff_context.net.2
""",
        "encoder": ("CLIPLoader", "ovis", "ovis_2.5.safetensors"),
        "stable_diffusion_cpp": "--llm ovis_2.5.safetensors --vae ae.safetensors",
    }
    unused = ()
    unguided = {"guidance_scale": 1.0}
    embedded_guidance = None
    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds"}
    guide = staticmethod(Family.guide)
    instruction = (  # what the model was trained with; 28 tokens with the chat's begin
        "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of "
        "the objects and background: "
    )
    before = 28

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        prompt = chats(pipe, [cls.instruction + p for p in prompt], enable_thinking=False)
        length = pipe.config.max_sequence_length + cls.before
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, length)
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return {"encoder_hidden_states": (states * tokens.attention_mask[..., None])[:, cls.before :]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c, (_, _, height, width) = c["encoder_hidden_states"].to(x_t.dtype), x_t.shape
        txt_ids = torch.arange(c.shape[1], device=t.device).view(-1, 1) * torch.tensor([0, 1, 1], device=t.device)
        output = network(
            hidden_states=OvisImage.tokens(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c,
            txt_ids=txt_ids,
            img_ids=positions(height // 2, width // 2, 3, t.device),
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @classmethod
    def stock_arguments(cls, pipe):
        return super(Flux, cls).stock_arguments(pipe)
