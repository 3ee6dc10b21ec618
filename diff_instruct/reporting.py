"""What people look at: the history of a run, its curves, its pictures and its progress bar."""

import json
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtAlphaPipeline
from PIL import Image, ImageDraw, ImageFont

from diff_instruct.evaluation import further_noise


REFERENCE_STEPS = 25
PANELS = {
    "reward (training batch)": ["reward", "reward_*"],
    "judged on held-out prompts": ["val_reward", "val_reward_*", "val_heldout", "val_heldout_*"],
    "diversity within a prompt": ["val_diversity"],
    "loss of the teaching assistant": ["ta_loss"],
    "gradient at x0, norm per sample": ["norm_reward", "norm_divergence", "norm_cfg"],
    "x0": ["x0_mean", "x0_std"],
}


class History:
    """The logged figures of a run, one JSON object a line; what a resumed run will repeat is dropped."""

    def __init__(self, output_dir, first_step):
        self.path, self.rows = Path(output_dir) / "history.jsonl", []
        if first_step and self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.rows = [row for row in rows if row["step"] <= first_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, accelerator, step, figures):
        """Append figures, and hand them to the trackers."""
        self.rows.append({"step": step, **figures})
        with self.path.open("a") as f:
            f.write(json.dumps(self.rows[-1]) + "\n")
        accelerator.log(figures, step=step)

    def plot(self, file):
        """Draw `curves.png`."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, PANELS.items()):
            logged = sorted({k for row in self.rows for k in row if any(fnmatch(k, pattern) for pattern in keys)})
            for key in logged:
                points = [(row["step"], row[key]) for row in self.rows if key in row]
                axis.plot(*zip(*points), marker="." if key.startswith("val") else None, label=key.removeprefix("val_"))
                axis.legend()
            axis.set(title=title, xlabel="generator step")
            axis.grid(alpha=0.3)
        figure.savefig(file, dpi=90)
        plt.close(figure)


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


def log_images(accelerator, step, images, prompts):
    """Validation pictures to TensorBoard, Weights & Biases and Trackio."""
    array = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", array, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            library = import_module(tracker.name)
            pictures = [library.Image(a, caption=p) for a, p in zip(array, prompts)]
            tracker.log({f"validation/{i}": picture for i, picture in enumerate(pictures)}, step=step)
