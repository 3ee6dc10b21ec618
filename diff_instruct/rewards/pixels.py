"""From pixels of any size, nominally in [0, 1], to what a vision network takes; every pixel keeps its gradient."""

import torch
import torch.nn.functional as F


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def full_precision(x):
    """x in float32, or in float64 if it is so already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clamp(pixels):
    """Pixels in [0, 1], in full precision. Those outside keep the gradient that they would have unclamped."""
    pixels = full_precision(pixels)
    return pixels + (pixels.clamp(0, 1) - pixels).detach()


def resize(pixels, height, width):
    """Bicubic with antialiasing, which PyTorch has for float32 and float64 only on the CPU."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(full_precision(pixels), size=(height, width), mode="bicubic", antialias=True)


def centre_square(pixels, size, floor=False):
    """Shorter side to `size`, the middle of the longer one: (B, 3, H, W) to (B, 3, size, size) in [0, 1].

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them; with `floor`, offsets are rounded
    down, as by transformers' CLIPImageProcessor.
    """
    height, width = pixels.shape[-2:]
    short, long = min(height, width), max(height, width)
    long = int(size * long / short)
    height, width = (long, size) if height > width else (size, long)
    pixels = clamp(resize(clamp(pixels), height, width))  # bicubic overshoots; 8-bit pictures cannot
    top, left = ((side - size) // 2 if floor else round((side - size) / 2) for side in (height, width))
    return pixels[:, :, top : top + size, left : left + size]


def padded_square(pixels, size):
    """Longer side to `size`, black on both sides of the shorter one: (B, 3, H, W) to (B, 3, size, size)."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    down, right = size - height, size - width
    pixels = resize(clamp(pixels), height, width)
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalise(pixels, mean, std):
    """(pixels − mean) / std, three numbers each."""
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels - mean) / std
