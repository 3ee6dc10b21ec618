"""The families of models: for each stock pipeline's class what training, export and evaluation must know of it.

The other half of a family, how it encodes, denoises and decodes, travels in `pipeline_one_step.FAMILIES`.
"""

from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from diff_instruct.mistake import Mistake


UNET_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        stock: class of the stock pipeline.
        denoiser: name of its network, "transformer" or "unet".
        timestep: t*, where a generator is evaluated if nobody says.
        unused: parts of the stock pipeline that text-to-image does not need.
        options: arguments with which the stock pipeline draws just what it is asked for.
        lora_targets: names of the layers that get adapters.
        stock_call: how an export runs in the stock pipeline; {prompt}, {steps} and {timesteps} are filled in.
    """

    stock: type[DiffusionPipeline]
    denoiser: str
    timestep: int
    stock_call: str
    unused: tuple = ()
    options: dict = field(default_factory=dict)
    lora_targets: tuple = UNET_LORA

    @property
    def has_lora_files(self):
        """Whether the stock pipeline loads LoRA files."""
        return hasattr(self.stock, "save_lora_weights")

    def null(self, stock, encode):
        """∅, one row: the conditioning of the empty prompt, or zeros where the reference was trained so (SDXL)."""
        c = encode([""])
        zeros = stock.config.get("force_zeros_for_empty_prompt", False)
        return {k: torch.zeros_like(v) if zeros else v for k, v in c.items()}

    @torch.no_grad()
    def sample(self, stock, prompts, z, steps, cfg_scale, size, num_images=1, generator=None):
        """Pixels (B·n, 3, H, W) in [0, 1] of the stock pipeline with its own sampler.

        Args:
            z (`torch.Tensor`, (B·n, C, h, w)): unit noise, n images of each of B prompts one after the other.
            cfg_scale: α_cfg, guidance as ∅ + α (c − ∅).
            size: (height, width), pixels.
            generator: of the noise that the sampler wants later.
        """
        stock.set_progress_bar_config(disable=True)
        z = z.to(getattr(stock, self.denoiser).dtype)
        height, width = size
        return stock(
            prompt=list(prompts),
            latents=z,
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images,
            generator=generator,
            output_type="pt",
            **self.options,
        ).images.float()


# Where a generator is evaluated: σ/α = 2.0 (as in DMD), 2.5 (as in SiD-LSG) and 1.2 (as in DMD2) on their schedules.
FAMILIES = {
    "PixArtAlphaPipeline": Family(
        stock=PixArtAlphaPipeline,
        denoiser="transformer",
        timestep=400,
        options={"use_resolution_binning": False, "clean_caption": False},  # they change the size and the prompt
        stock_call="""\
from diffusers import LCMScheduler, PixArtAlphaPipeline
stock = PixArtAlphaPipeline.from_pipe(pipe, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
image = stock(
    {prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=1.0, use_resolution_binning=False
).images[0]""",
    ),
    "StableDiffusionPipeline": Family(
        stock=StableDiffusionPipeline,
        denoiser="unet",
        timestep=625,
        unused=("safety_checker", "feature_extractor", "image_encoder"),
        stock_call="""\
from diffusers import LCMScheduler, StableDiffusionPipeline
parts = {{"scheduler": LCMScheduler.from_config(pipe.scheduler.config), "safety_checker": None}}
stock = StableDiffusionPipeline.from_pipe(pipe, **parts, feature_extractor=None, image_encoder=None)
image = stock({prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=0).images[0]""",
    ),
    "StableDiffusionXLPipeline": Family(
        stock=StableDiffusionXLPipeline,
        denoiser="unet",
        timestep=399,
        unused=("feature_extractor", "image_encoder"),
        stock_call="""\
from diffusers import LCMScheduler, StableDiffusionXLPipeline
stock = StableDiffusionXLPipeline.from_pipe(pipe, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
image = stock({prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=0).images[0]""",
    ),
}


def find_family(name, path):
    """The record of a stock pipeline's class.

    Raises:
        Mistake: if it is not supported.
    """
    if name not in FAMILIES:
        raise Mistake(f"{path} is a {name}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
