"""A small decoder for the reward's gradient, instead of the VAE: TAESD (`--reward_decoder`)."""

import torch
from diffusers import AutoencoderTiny

from diff_instruct.mistake import Mistake


class TinyDecoder(torch.nn.Module):
    """Latents x0 of the VAE that it imitates, (B, C, h, w), to pixels (B, 3, H, W), nominally in [0, 1].

    Args:
        path (`str`): Hub id or folder of an `AutoencoderTiny`, for example madebyollin/taesd.
        latent_channels (`int`): C, of the model that is trained.

    Raises:
        Mistake: if it is not there or made for other latents.
    """

    def __init__(self, path, latent_channels, cache_dir=None):
        super().__init__()
        try:
            self.vae = AutoencoderTiny.from_pretrained(path, cache_dir=cache_dir)
        except OSError as error:
            line = str(error).split("\n")[0]
            raise Mistake(f"--reward_decoder {path}: no AutoencoderTiny on the Hub or a folder: {line}") from None
        channels = self.vae.config.latent_channels
        if channels != latent_channels:
            raise Mistake(f"--reward_decoder {path} decodes {channels} channels; the latents have {latent_channels}")
        self.requires_grad_(False).eval()

    def forward(self, x0):
        config = self.vae.config
        latents = (x0 / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5
