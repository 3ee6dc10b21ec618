"""Loads the reference and the generator (see `configs` for what is checked before)."""

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from diff_instruct.models.lora import add_lora
from diff_instruct.models.sources import generator_source
from pipeline_one_step import OneStepPipeline


# Parts of a stock pipeline that text-to-image does not need.
UNUSED = {
    "PixArtAlphaPipeline": {},
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "image_encoder": None},
    "StableDiffusionXLPipeline": {"feature_extractor": None, "image_encoder": None},
}


def load_reference(args, models, dtype):
    """The stock pipeline of the reference, frozen, its networks in `dtype`."""
    stock = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=dtype,
        **UNUSED[models.family],
    )
    for name in models.networks:
        getattr(stock, name).requires_grad_(False).eval()
    return stock


def load_network(args, models, reference, dtype):
    """The network that the generator starts as: the reference's, or that of `--pretrained_generator_name_or_path`."""
    cls, options = type(reference), {"cache_dir": args.cache_dir, "dtype": dtype}
    if args.pretrained_generator_name_or_path is None:
        options.update(subfolder=models.denoiser, revision=args.revision, variant=args.variant)
        return cls.from_pretrained(args.pretrained_model_name_or_path, **options)
    kind, source = generator_source(args, models.denoiser)
    if kind == "folder":
        return cls.from_pretrained(**source, **options)
    if source.endswith(".safetensors"):
        state = load_file(source)
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)
    network = cls.from_config(reference.config).to(dtype)
    network.load_state_dict(state)
    return network


def load_generator(args, models, stock):
    """The pipeline that is trained and shipped: the reference's parts around the generator at t*.

    The generator is float32, or, with `--lora_rank`, float32 adapters in a frozen network of the reference's dtype.
    """
    reference = getattr(stock, models.denoiser)
    if args.lora_rank == 0:
        generator = load_network(args, models, reference, torch.float32).requires_grad_(True)
    else:
        generator = load_network(args, models, reference, reference.dtype)
        generator = add_lora(generator, args.lora_rank, args.lora_alpha)
    parts = {name: getattr(stock, name, None) for name in OneStepPipeline._optional_components}
    parts[models.denoiser] = generator
    options = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}
    scheduler = DDPMScheduler.from_config(stock.scheduler.config, **options)
    return OneStepPipeline(**parts, vae=stock.vae, scheduler=scheduler, timestep=models.timestep)


def null_condition(stock, encode):
    """∅, one row: the conditioning of the empty prompt, or zeros where the reference was trained so (SDXL)."""
    c = encode([""])
    zeros = stock.config.get("force_zeros_for_empty_prompt", False)
    return {k: torch.zeros_like(v) if zeros else v for k, v in c.items()}
