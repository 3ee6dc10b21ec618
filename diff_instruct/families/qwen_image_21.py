# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image 2.1."""

import torch

from diff_instruct.families.qwen_image import QwenImage
from pipeline_one_step import ATTENTION, Grid, device_of, masked_tokens


class QwenImage21(QwenImage):
    """Qwen-Image 2.1: a transformer over one sequence of prompt (Qwen3-VL's states of a chat, before their last norm,
    without those of the system's message) and image; the VAE knows transparency.

    The image's place is behind the prompt and its padding. So that no prompt depends on the others, each is a call of
    its own, without padding.
    """

    name = "QwenImage21Pipeline"
    alone = True
    renormalised = None
    lora_targets = (*ATTENTION, "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")
    max_sequence_length = None
    apps = None
    before = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"  # as the model was trained
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        tokenizer, length = pipe.processor.tokenizer, pipe.config.max_sequence_length
        before, prompt = len(tokenizer.encode(cls.before)), [cls.template.format(p or " ") for p in prompt]
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        options |= {"truncation": True, "max_length": length + before} if length else {}
        tokens = tokenizer([cls.before + p for p in prompt], **options).to(device_of(pipe.text_encoder))
        norm, masked = pipe.text_encoder.model.language_model.norm, {"attention_mask": tokens.attention_mask}
        skipped = norm.register_forward_hook(lambda module, states, _: states[0])
        try:
            states = pipe.text_encoder(tokens.input_ids, **masked, output_hidden_states=True).hidden_states[-1]
        finally:
            skipped.remove()
        mask = tokens.attention_mask[:, before:]
        return {"encoder_hidden_states": states[:, before:], "encoder_attention_mask": mask}

    @classmethod
    def denoise(cls, pipe, network, x_t, t, c):
        (_, _, height, width), time = x_t.shape, t.to(x_t.dtype) / pipe.schedule.steps

        def output(x_t, time, c):
            slots = torch.arange(len(c) + height * width // 4, device=c.device, dtype=torch.int64) >= len(c)
            output = network(
                hidden_states=cls.tokens(x_t),
                timestep=time,
                encoder_hidden_states=c[None],
                img_shapes=[[(1, height, width)]],
                img_mask=slots[None],
                return_dict=False,
            )
            return cls.from_tokens(output[0][:, -height * width :], x_t.shape)

        rows = zip(x_t.split(1), time.split(1), masked_tokens(c, x_t.dtype))
        return torch.cat([output(*row) for row in rows])

    @staticmethod
    def grid(network, vae):
        factor = 2 ** len(vae.temperal_downsample)
        return Grid(network.in_channels, factor, 2 * factor, 64 * factor)

    @staticmethod
    def decode(pipe, x0):
        return QwenImage.decode(pipe, x0, first_chunk=True)

    @staticmethod
    def opaque(pixels):
        """On white; of pixels in [0, 1], as in a file, with the gradient that they have outside."""
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        colour, alpha = pixels.split([3, 1], dim=1)
        return colour * alpha + (1 - alpha)

    @staticmethod
    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    @staticmethod
    def from_tokens(tokens, shape):
        return tokens.transpose(1, 2).reshape(shape)

    @staticmethod
    def stock_latents(z, sigma=1.0):
        return z.flatten(2).transpose(1, 2)
