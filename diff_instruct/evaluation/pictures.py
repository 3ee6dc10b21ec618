"""What people look at: the history of a run, its curves, its pictures and its progress bar."""

import torch
from diffusers import PixArtAlphaPipeline
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
def draw(pipe, encode, prompts, noise):
    """Images (B, 3, H, W) in [0, 1] of the generator for prompts and noise z (B, C, H, W); further noise is fixed."""
    further = further_noise(pipe, noise, 0)
    x0 = [
        pipe.generate(pipe.denoiser, z[None], encode([c]), [eps[i : i + 1] for eps in further])
        for i, (c, z) in enumerate(zip(prompts, noise))
    ]
    return torch.cat([pipe.decode(latents).clamp(0, 1) for latents in x0])


@torch.no_grad()
def draw_reference(stock, decode, prompts, noise, cfg_scale, steps=REFERENCE_STEPS):
    """Images (B, 3, H, W) in [0, 1] of the reference itself, in many steps with guidance."""
    stock.set_progress_bar_config(disable=True)
    noise = noise.to(stock.vae.dtype)
    height, width = (n * stock.vae_scale_factor for n in noise.shape[-2:])
    options = {"num_inference_steps": steps, "guidance_scale": cfg_scale, "height": height, "width": width}
    if isinstance(stock, PixArtAlphaPipeline):  # it would change the size and the prompt
        options.update(use_resolution_binning=False, clean_caption=False)
    latents = [stock(c, latents=z[None], output_type="latent", **options).images for c, z in zip(prompts, noise)]
    return torch.cat([decode(x0) for x0 in latents]).clamp(0, 1)
