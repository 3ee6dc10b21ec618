"""What people look at: the history of a run, its curves, its pictures and its progress bar."""

import torch
from PIL import Image, ImageDraw, ImageFont

from diff_instruct.evaluation.noise import further_noise


REFERENCE_STEPS = 25


def image_grid(columns, titles, prompts):
    """One picture: a row for each prompt, a column for each (title, images (B, 3, H, W) in [0, 1])."""
    size = max(150, columns[0].shape[-1])  # wide enough for the titles
    label, head = 230, 26
    sheet = Image.new("RGB", (label + (size + 4) * len(columns), head + (size + 4) * len(prompts)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, (images, title) in enumerate(zip(columns, titles)):
        draw.text((label + (size + 4) * k + 2, 6), title, fill="black", font=font)
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for row, array in enumerate(pixels):
            sheet.paste(Image.fromarray(array).resize((size, size)), (label + (size + 4) * k, head + (size + 4) * row))
    for row, prompt in enumerate(prompts):
        words, lines = prompt.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}", font=font) > label - 12:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.text((6, head + (size + 4) * row + 8), "\n".join(lines[:6]), fill="black", font=font)
    return sheet


@torch.no_grad()
def draw(generator, encode, prompts, noise):
    """Images (B, 3, H, W) in [0, 1] of a generator, a [`Denoiser`], for prompts and noise z (B, C, H, W), one by one.

    The noise of further steps is fixed."""
    further = further_noise(generator.pipe, noise, 0)
    pixels = []
    for i, (c, z) in enumerate(zip(prompts, noise)):
        x0 = generator.generate(z[None], encode([c]), [eps[i : i + 1] for eps in further])
        pixels.append(generator.pipe.decode(x0).clamp(0, 1))
    return torch.cat(pixels)


@torch.no_grad()
def draw_reference(family, stock, prompts, noise, size, cfg_scale, steps=REFERENCE_STEPS):
    """Images (B, 3, H, W) in [0, 1] of the reference itself, in many steps with guidance, one by one."""
    pictures = [family.sample(stock, [c], z[None], steps, cfg_scale, size) for c, z in zip(prompts, noise)]
    return torch.cat(pictures)
