# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image."""

import torch

from pipeline_one_step import JOINT_ATTENTION, Family, Grid, device_of, pack, unpack


class QwenImage(Family):
    """Qwen-Image: a transformer over the tokens of image and prompt (Qwen2.5-VL's states of a chat, without those of
    the system's message), under a mask; the VAE is that of a video, here of one frame."""

    name = "QwenImagePipeline"
    renormalised = "to the norm of c, token by token"
    unguided = {"true_cfg_scale": 1.0}
    lora_targets = (*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    apps = {
        "original": "",
        "architecture": "qwen_image",
        "encoder": ("CLIPLoader", "qwen_image", "qwen_2.5_vl_7b.safetensors"),
        "latent": "EmptySD3LatentImage",
        "vae": "qwen_image_vae.safetensors",
        "stable_diffusion_cpp": "--llm qwen_2.5_vl_7b.safetensors --vae qwen_image_vae.safetensors",
    }
    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    null_prompt = " "
    template = (  # what the model was trained with, 34 tokens before the prompt
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    before = 34

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        options = {"padding": True, "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        prompt, length = [cls.template.format(p) for p in prompt], pipe.config.max_sequence_length
        tokens = pipe.tokenizer(prompt, max_length=length + cls.before, **options).to(device_of(pipe.text_encoder))
        mask = tokens.attention_mask
        states = pipe.text_encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return {"encoder_hidden_states": states[-1][:, cls.before :], "encoder_attention_mask": mask[:, cls.before :]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        b, _, height, width = x_t.shape
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_mask=c["encoder_attention_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * b,
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** len(vae.temperal_downsample)
        return Grid(network.in_channels // 4, factor, 2 * factor, 128 * factor)

    @staticmethod
    def decode(pipe, x0, **options):
        """Through the VAE's parts: its `decode` clamps, and beyond [−1, 1] a reward would have no gradient; in tiles
        or slices, which training has no use for, through `decode`."""
        vae = pipe.vae
        if hasattr(vae, "_hf_hook"):  # with accelerate's offloading
            vae._hf_hook.pre_forward(vae)
        mean, std = (
            torch.tensor(v, device=x0.device).view(1, -1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = (x0 * std + mean).to(vae.dtype).unsqueeze(2)
        if vae.use_tiling or vae.use_slicing:
            return vae.decode(latents, return_dict=False)[0][:, :, 0]
        return vae.decoder(vae.post_quant_conv(latents), **options)[:, :, 0]

    @staticmethod
    def guide(alpha, embedded, n):
        return {"true_cfg_scale": alpha, "negative_prompt": [" "] * n}

    tokens = staticmethod(pack)
    from_tokens = staticmethod(unpack)

    @staticmethod
    def stock_latents(z, sigma=1.0):
        return pack(z)
