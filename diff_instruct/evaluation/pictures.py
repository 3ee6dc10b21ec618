"""What people look at: the history of a run, its curves, its pictures and its progress bar."""

from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from diff_instruct.evaluation.noise import further_noise
from diff_instruct.mistake import Mistake
from diff_instruct.models.reference import sample


REFERENCE_STEPS = 25


def image_grid(columns, prompts, marks=None):
    """One picture: a row for each prompt, a column for each title; all pictures in the form of the first.

    Args:
        columns (`dict`): title to B pictures in [0, 1]: a tensor (B, 3, H, W), or a list of tensors (3, H, W), and of
            None where there is no picture.
        marks (`dict`, *optional*): title to {what was measured: (B,) 1, 0, or NaN where it does not apply}, drawn as
            ticks and crosses; see [`measured`].
    """
    shown = next(image for column in columns.values() for image in column if image is not None)
    size = max(165 if marks else 150, shown.shape[-1])  # wide enough for what is written
    tall = round(size * shown.shape[-2] / shown.shape[-1])
    label, head, foot = 230, 26, 18 if marks else 0
    width, height = size + 4, tall + foot + 4
    sheet = Image.new("RGB", (label + width * len(columns), head + height * len(prompts)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, (title, images) in enumerate(columns.items()):
        draw.text((label + width * k + 2, 6), title, fill="black", font=font)
        for row, image in enumerate(images):
            if image is not None:
                place = label + width * k, head + height * row
                sheet.paste(picture(image).resize((size, tall)), place)
                if marks:
                    draw_marks(draw, place[0], place[1] + tall, {what: m[row] for what, m in marks[title].items()})
    for row, prompt in enumerate(prompts):
        words, lines = prompt.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}", font=font) > label - 12:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.text((6, head + height * row + 8), "\n".join(lines[:6]), fill="black", font=font)
    return sheet


def picture(pixels):
    """A PIL image of pixels (3, H, W) in [0, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels[None].clamp(0, 1)))[0]


def from_picture(image):
    """Pixels (3, H, W) in [0, 1] of a PIL image."""
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image.convert("RGB")))[0]


def draw_marks(draw, x, y, marks):
    """A tick or a cross before each name, from (x, y) to the right: {name: 1, 0 or NaN, which is left out}."""
    font = ImageFont.load_default(10)
    for name, right in marks.items():
        if right == 1:
            draw.line([(x + 1, y + 10), (x + 4, y + 13), (x + 9, y + 5)], fill=(20, 140, 40), width=2)
        elif right == 0:
            draw.line([(x + 1, y + 5), (x + 9, y + 13)], fill=(200, 30, 30), width=2)
            draw.line([(x + 1, y + 13), (x + 9, y + 5)], fill=(200, 30, 30), width=2)
        if right == right:
            draw.text((x + 12, y + 3), name, fill="black", font=font)
            x += 16 + round(draw.textlength(name, font=font))


def real_pictures(folder, prompts):
    """For each prompt its picture (3, H, W) in [0, 1], `<prompt>.png` of the folder, or None if it has none; an empty
    list without a folder.

    Raises:
        Mistake: for a file that is no picture.
    """
    pictures = []
    for file in [Path(folder) / f"{prompt}.png" for prompt in prompts] if folder else []:
        try:
            pictures.append(from_picture(Image.open(file)) if file.is_file() else None)
        except (UnidentifiedImageError, OSError):
            raise Mistake(f"--validation_images: {file} is not a picture that can be read") from None
    return pictures


def measured(scorers, columns, prompts):
    """What the first of the scorers that measures says of the columns of [`image_grid`]: its `marks`, or None if none
    measures. Such a scorer, `pocket_truth`, has `can_measure(prompt)`; other prompts get no marks.
    """
    scorer = next((s for s in scorers.values() if hasattr(s, "measure")), None)
    if scorer is None:
        return None
    marks, device = {}, next(scorer.parameters()).device
    for title, column in columns.items():
        marks[title] = {}
        rows = [i for i, p in enumerate(prompts) if column[i] is not None and scorer.can_measure(p)]
        if rows:
            seen = scorer.measure(torch.stack([column[i].to(device) for i in rows]), [prompts[i] for i in rows])
            for what, right in seen.items():
                marks[title][what] = torch.full((len(prompts),), torch.nan)
                marks[title][what][rows] = right.cpu()
    return marks


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
def draw_reference(models, stock, prompts, noise, size, cfg_scale, steps=REFERENCE_STEPS):
    """Images (B, 3, H, W) in [0, 1] of the reference itself, in many steps with guidance, one by one; the noise that
    its sampler may draw is fixed."""
    pictures = []
    for i, (c, z) in enumerate(zip(prompts, noise)):
        rng = torch.Generator().manual_seed(i)
        pictures.append(sample(models, stock, [c], z[None], steps, cfg_scale, size, generator=rng))
    return torch.cat(pictures)
