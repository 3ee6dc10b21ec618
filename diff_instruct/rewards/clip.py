"""CLIP-style scorers on transformers' `CLIPModel`: how well an image fits its prompt."""

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel


class ClipReward(torch.nn.Module):
    """(cosine(image, prompt) − mean) / std, differentiable in the pixels.

    Args:
        path (`str`): Hub id or folder with a `CLIPModel` and its tokenizer.
        pixel_mean, pixel_std: three numbers each, for pixels in [0, 1].
        mean, std (`float`): location and spread of the cosine, so that the reward has unit spread.
    """

    def __init__(self, path, pixel_mean, pixel_std, mean=0.0, std=1.0, cache_dir=None):
        super().__init__()
        self.model = (
            CLIPModel.from_pretrained(path, cache_dir=cache_dir, dtype=torch.float32).eval().requires_grad_(False)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1))
        self.mean, self.std = mean, std

    def image_features(self, pixels):
        """Unit vectors (B, D) of pixels (B, 3, H, W), nominally in [0, 1]; H and W are cut to a square."""
        pixels = pixels.float()
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()  # clamped, yet with the gradient of the unclamped
        size = self.model.config.vision_config.image_size
        height, width = pixels.shape[-2:]
        if (height, width) != (size, size):
            scale = size / min(height, width)
            shape = (max(size, round(height * scale)), max(size, round(width * scale)))
            pixels = F.interpolate(pixels, size=shape, mode="bicubic", antialias=True)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            pixels = pixels[:, :, top : top + size, left : left + size]
        features = self.model.get_image_features((pixels - self.pixel_mean) / self.pixel_std).pooler_output
        return F.normalize(features.float(), dim=-1)

    def text_features(self, prompts):
        """Unit vectors (B, D) of a list of B prompts."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.pixel_mean.device)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def forward(self, pixels, prompts):
        """Reward (B,) of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        cosine = (self.image_features(pixels) * self.text_features(prompts)).sum(dim=-1)
        return (cosine - self.mean) / self.std
