"""The families of models: for each stock pipeline's class what training, export and evaluation must know of it.

The other half of a family, how it encodes, denoises and decodes, travels in `pipeline_one_step.FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch

from diff_instruct.mistake import Mistake
from pipeline_one_step import FAMILIES as PIPELINE_FAMILIES
from pipeline_one_step import pack


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONTEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: class name of the stock pipeline.
        stock_call: how an export runs in the stock pipeline; {prompt}, {steps}, {timesteps}, {sigmas}, {angles} and
            {guidance} are filled in.
        denoiser: name of its network, "transformer" or "unet".
        flow: whether it matches flows; else its schedule has betas.
        timestep: t*, where a generator is evaluated if nobody says.
        unused: parts of the stock pipeline that text-to-image does not need.
        options: arguments with which the stock pipeline draws just what it is asked for.
        guide: arguments of the stock pipeline for ∅ + α (c − ∅), of α, embedded guidance, number of prompts.
        has_null: whether the reference knows ∅, so whether α_cfg may be other than 1.
        packed: whether the stock pipeline takes noise as tokens (see `pack`).
        lora_targets: ends of the names of the layers that get adapters.
        embedded_guidance: of networks that have guidance as an input; None is the stock's.
    """

    name: str
    stock_call: str
    denoiser: str = "transformer"
    flow: bool = True
    timestep: int = 1000
    unused: tuple = ()
    options: dict = field(default_factory=dict)
    guide: Callable = lambda alpha, embedded, n: {"guidance_scale": alpha}
    has_null: bool = True
    packed: bool = False
    lora_targets: tuple = (*ATTENTION, *FEED_FORWARD)
    embedded_guidance: float | None = None

    @property
    def stock(self):
        """Class of the stock pipeline; diffusers imports it when it is asked for."""
        return getattr(diffusers, self.name)

    @property
    def in_pipeline(self):
        """The half of the family that travels."""
        return PIPELINE_FAMILIES[self.name]

    @property
    def has_lora_files(self):
        """Whether the stock pipeline loads LoRA files."""
        return hasattr(self.stock, "save_lora_weights")

    def null(self, stock, pipe, encode):
        """∅, one row: that of the stock pipeline, or zeros where the reference was trained so (SDXL)."""
        c = encode.null(pipe.encode_null)
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
        embedded = self.embedded_guidance
        if embedded is None:
            embedded = self.in_pipeline.embedded_guidance
        z, prompts = z.to(getattr(stock, self.denoiser).dtype), [p for p in prompts for _ in range(num_images)]
        height, width = size
        return stock(
            prompt=prompts,
            latents=pack(z) if self.packed else z,
            num_inference_steps=steps,
            height=height,
            width=width,
            generator=generator,
            output_type="pt",
            **self.guide(cfg_scale, embedded, len(prompts)),
            **self.options,
        ).images.float()


# Where a generator is evaluated: σ/α = 2.0 (as in DMD), 2.5 (as in SiD-LSG) and 1.2 (as in DMD2) on their schedules.
# Flow matching starts at σ = 1, where z is all that there is.
FAMILIES = (
    Family(
        "PixArtAlphaPipeline",
        flow=False,
        timestep=400,
        options={"use_resolution_binning": False, "clean_caption": False},  # they change the size and the prompt
        stock_call="""\
from diffusers import LCMScheduler, PixArtAlphaPipeline
stock = PixArtAlphaPipeline.from_pipe(pipe, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
image = stock(
    {prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=1.0, use_resolution_binning=False
).images[0]""",
    ),
    Family(
        "StableDiffusionPipeline",
        denoiser="unet",
        flow=False,
        timestep=625,
        unused=("safety_checker", "feature_extractor", "image_encoder"),
        stock_call="""\
from diffusers import LCMScheduler, StableDiffusionPipeline
parts = {{"scheduler": LCMScheduler.from_config(pipe.scheduler.config), "safety_checker": None}}
stock = StableDiffusionPipeline.from_pipe(pipe, **parts, feature_extractor=None, image_encoder=None)
image = stock({prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=0).images[0]""",
    ),
    Family(
        "StableDiffusionXLPipeline",
        denoiser="unet",
        flow=False,
        timestep=399,
        unused=("feature_extractor", "image_encoder"),
        stock_call="""\
from diffusers import LCMScheduler, StableDiffusionXLPipeline
stock = StableDiffusionXLPipeline.from_pipe(pipe, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
image = stock({prompt}, num_inference_steps={steps}, timesteps={timesteps}, guidance_scale=0).images[0]""",
    ),
    Family(
        "StableDiffusion3Pipeline",
        unused=("feature_extractor", "image_encoder"),
        lora_targets=(*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD),
        stock_call="""\
from diffusers import StableDiffusion3Pipeline
stock = StableDiffusion3Pipeline.from_pipe(pipe)
image = stock({prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale=1.0).images[0]""",
    ),
    Family(
        "SanaPipeline",
        options={"use_resolution_binning": False},
        lora_targets=(*ATTENTION, "ff.conv_inverted", "ff.conv_point"),
        stock_call="""\
from diffusers import SanaPipeline
stock = SanaPipeline.from_pipe(pipe)
image = stock(
    {prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale=1.0, use_resolution_binning=False
).images[0]""",
    ),
    Family(
        "SanaSprintPipeline",
        options={"use_resolution_binning": False, "intermediate_timesteps": None},  # the latter is for two steps only
        guide=lambda alpha, embedded, n: {"guidance_scale": embedded},
        has_null=False,
        lora_targets=(*ATTENTION, "ff.conv_inverted", "ff.conv_point"),
        stock_call="""\
from diffusers import SanaSprintPipeline, SCMScheduler
stock = SanaSprintPipeline.from_pipe(pipe, scheduler=SCMScheduler())
angles = {{"timesteps": {angles}, "max_timesteps": None, "intermediate_timesteps": None}}
set_timesteps = stock.scheduler.set_timesteps  # the pipeline's own argument for them does not arrive
stock.scheduler.set_timesteps = lambda n, device=None, **_: set_timesteps(n, device=device, **angles)
image = stock(
    {prompt}, num_inference_steps={steps}, intermediate_timesteps=None, guidance_scale={guidance},
    use_resolution_binning=False
).images[0]""",
    ),
    Family(
        "ZImagePipeline",
        guide=lambda alpha, embedded, n: {"guidance_scale": alpha - 1},  # c + g (c − ∅)
        lora_targets=(*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        stock_call="""\
from diffusers import ZImagePipeline
stock = ZImagePipeline.from_pipe(pipe)
image = stock({prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale=0.0).images[0]""",
    ),
    Family(
        "FluxPipeline",
        unused=("feature_extractor", "image_encoder"),
        guide=lambda alpha, embedded, n: {
            "guidance_scale": embedded,
            "true_cfg_scale": alpha,
            "negative_prompt": [""] * n,
        },
        packed=True,
        lora_targets=(*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD, "proj_mlp"),
        stock_call="""\
from diffusers import FluxPipeline
stock = FluxPipeline.from_pipe(pipe)
image = stock({prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale={guidance}).images[0]""",
    ),
    Family(
        "Flux2KleinPipeline",
        lora_targets=(*JOINT_ATTENTION, "linear_in", "linear_out", "to_qkv_mlp_proj"),
        stock_call="""\
from diffusers import Flux2KleinPipeline
stock = Flux2KleinPipeline.from_pipe(pipe)
image = stock(prompt={prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale=1.0).images[0]""",
    ),
    Family(
        "QwenImagePipeline",
        guide=lambda alpha, embedded, n: {"true_cfg_scale": alpha, "negative_prompt": [" "] * n},
        packed=True,
        lora_targets=(*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        stock_call="""\
from diffusers import QwenImagePipeline
stock = QwenImagePipeline.from_pipe(pipe)
image = stock({prompt}, num_inference_steps={steps}, sigmas={sigmas}, true_cfg_scale=1.0).images[0]""",
    ),
    Family(
        "Lumina2Pipeline",
        options={"cfg_normalization": False},  # the reference's guidance is the one that is trained against
        lora_targets=(*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
        stock_call="""\
from diffusers import Lumina2Pipeline
stock = Lumina2Pipeline.from_pipe(pipe)
image = stock({prompt}, num_inference_steps={steps}, sigmas={sigmas}, guidance_scale=1.0).images[0]""",
    ),
)
FAMILIES = {family.name: family for family in FAMILIES}


def find_family(name, path):
    """The record of a stock pipeline's class.

    Raises:
        Mistake: if it is not supported.
    """
    if name not in FAMILIES:
        raise Mistake(f"{path} is a {name}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
