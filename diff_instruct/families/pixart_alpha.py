# SPDX-License-Identifier: Apache-2.0
"""PixArt-α."""

import torch

from pipeline_one_step import Family, device_of


SIZES = {  # embedders of the size, which the model of 512 pixels lacks; by them ComfyUI tells PixArt-α from PixArt-Σ
    f"adaln_single.emb.{name}_embedder.linear_{i}.{kind}": shape
    for name in ("resolution", "aspect_ratio")
    for i, kind, shape in (
        (1, "weight", (384, 256)),
        (1, "bias", (384,)),
        (2, "weight", (384, 384)),
        (2, "bias", (384,)),
    )
}


class PixArtAlpha(Family):
    """PixArt-α: a transformer with learned sigma that attends to T5's states, under their mask."""

    name = "PixArtAlphaPipeline"
    flow = False
    timestep = 400  # σ/α = 2.0, as in DMD
    options = {"use_resolution_binning": False, "clean_caption": False}  # they change the size and the prompt
    apps = {
        "betas": ("linear", 0.0001, 0.02),
        "encoder": ("CLIPLoader", "pixart", "t5xxl_fp16.safetensors"),
        "zeros": SIZES,
    }
    max_sequence_length = 120
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        prompt, length = [p.lower().strip() for p in prompt], pipe.config.max_sequence_length
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(device_of(pipe.text_encoder))
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": tokens.attention_mask}

    @classmethod
    def denoise(cls, pipe, network, x_t, t, c):
        micro = {"resolution": None, "aspect_ratio": None}
        if cls.reads_the_size(pipe):
            height, width = (n * pipe.grid.factor for n in x_t.shape[-2:])
            size = torch.tensor([[height, width]], dtype=x_t.dtype, device=x_t.device)
            ratio = torch.tensor([[height / width]], dtype=x_t.dtype, device=x_t.device)
            micro = {"resolution": size.repeat(len(x_t), 1), "aspect_ratio": ratio.repeat(len(x_t), 1)}
        output = network(
            x_t,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=c["encoder_attention_mask"],
            timestep=t,
            added_cond_kwargs=micro,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]  # the rest is the learned sigma

    @staticmethod
    def reads_the_size(pipe):
        """Whether the network is also conditioned on height and width: at 1024 pixels."""
        return pipe.denoiser.config.sample_size == 128

    @classmethod
    def text_node(cls, pipe):
        return "CLIPTextEncodePixArtAlpha" if cls.reads_the_size(pipe) else "CLIPTextEncode"
