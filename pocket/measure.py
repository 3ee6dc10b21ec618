"""Stage `measure`: how much of what a caption says real pictures, reconstructions and the reference show."""

import json
import random
from pathlib import Path

import torch
from PIL import Image

from pocket import truth, world
from pocket.reference import sample


GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)


def rates(pixels, captions, scorer):
    """Background, colour and noun, each the share that is right of those that say one."""
    result = truth.measure(pixels, truth.meanings_of(captions), scorer)
    return {what: round(right.nanmean().item(), 3) for what, right in result.items()}


def some_pairs(pictures, heldout, n, seed=0):
    """n pairs with different captions that name a colour, (n,): seen ones, or held-out ones."""
    pairs = (pictures.heldout == heldout).nonzero()[:, 0].tolist()
    random.Random(seed).shuffle(pairs)
    by_caption = {}
    for i in pairs:
        m = pictures.meaning(i)
        if m.colour and m not in by_caption:
            by_caption[m] = i
        if len(by_caption) == n:
            break
    return torch.tensor(list(by_caption.values()))


@torch.no_grad()
def measure_reference(pipe, pictures, scorer, n=96, guidance_scales=GUIDANCE, steps=25):
    """{`seen` or `heldout`: {what is judged: rates}}, from the same n captions and noises for each guidance."""
    table = {}
    for group, heldout in (("seen", False), ("heldout", True)):
        index = some_pairs(pictures, heldout, n)
        meanings = [pictures.meaning(i) for i in index]
        captions = [world.caption(m.noun, m.colour, m.background) for m in meanings]
        real = pictures.pixels(index)
        latents = pipe.vae.encode(real * 2 - 1).latent_dist.mode()
        decoded = torch.cat([pipe.vae.decode(z).sample for z in latents.split(64)]) / 2 + 0.5
        table[group] = {
            "real pictures": rates(real, captions, scorer),
            "through the VAE": rates(decoded.clamp(0, 1), captions, scorer),
        }
        for g in guidance_scales:
            table[group][f"guidance {g:g}"] = rates(sample(pipe, captions, g, steps=steps), captions, scorer)
    return table


def as_markdown(table):
    """The table of `measure_reference` in rows."""
    lines = [
        "| | background, seen | colour | noun | background, held out | colour | noun |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["seen"]:
        cells = [f"{100 * table[g][row][what]:.0f}%" for g in table for what in ("background", "colour", "noun")]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sheet(pixels, columns):
    """A PIL image of pixels (B, 3, H, W) in [0, 1], row by row; B must be a multiple of `columns`."""
    b, _, h, w = pixels.shape
    grid = pixels.view(b // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, 3)
    return Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy())


def save_samples(pipe, pictures, folder, guidance_scale):
    """`samples.png` and `samples.txt`: 48 seen captions, then 48 held out, 12 a row."""
    index = torch.cat([some_pairs(pictures, heldout, 48, seed=1) for heldout in (False, True)])
    meanings = [pictures.meaning(i) for i in index]
    captions = [world.caption(m.noun, m.colour, m.background) for m in meanings]
    sheet(sample(pipe, captions, guidance_scale), 12).save(Path(folder) / "samples.png")
    lines = (", ".join(captions[i : i + 12]) for i in range(0, len(captions), 12))
    (Path(folder) / "samples.txt").write_text("\n".join(lines) + "\n")


def save_table(table, folder):
    """`report.json` and `report.md`."""
    (Path(folder) / "report.json").write_text(json.dumps(table, indent=1) + "\n")
    (Path(folder) / "report.md").write_text(as_markdown(table))
