"""Loads the reference and the generator, after checking what can be checked without their weights."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline

from pipeline_one_step import OneStepPipeline


SUPPORTED = ("PixArtAlphaPipeline",)
DEFAULT_TIMESTEP = 400  # σ/α = 2.0 on PixArt's schedule, as DMD uses it


def read_model_index(path, **where):
    """The `model_index.json` of a pipeline on the Hub or in a folder.

    Raises:
        ValueError: if there is none.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"{path} has no model_index.json: give the folder of a whole diffusers pipeline")
    try:
        return DiffusionPipeline.load_config(path, **where)
    except OSError as error:
        raise ValueError(f"no pipeline can be read from {path}: {str(error).splitlines()[0]}") from None


def check_models(args):
    """t*, after reading both model indices.

    Raises:
        ValueError: for a pipeline that is not there or not supported, or a generator without its t*.
    """
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    name = read_model_index(args.pretrained_model_name_or_path, **where)["_class_name"]
    if name not in SUPPORTED:
        raise ValueError(f"{args.pretrained_model_name_or_path} is a {name}; supported are {', '.join(SUPPORTED)}")
    if args.pretrained_generator_name_or_path is None:
        return DEFAULT_TIMESTEP if args.timestep is None else args.timestep
    path = args.pretrained_generator_name_or_path
    trained_at = read_model_index(path, cache_dir=args.cache_dir).get("timestep")
    if trained_at is None:
        raise ValueError(f"{path} is no OneStepPipeline: its model_index.json names no timestep t*")
    if args.timestep not in (None, trained_at):
        raise ValueError(f"--timestep {args.timestep} does not fit {path}, which was trained at t* = {trained_at}")
    return trained_at


def load_reference(args, dtype):
    """The stock pipeline of the reference, frozen, its networks in `dtype`."""
    stock = PixArtAlphaPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=dtype,
    )
    for network in (stock.transformer, stock.text_encoder, stock.vae):
        network.requires_grad_(False).eval()
    return stock


def load_generator(args, stock, timestep):
    """The pipeline that is trained and shipped: the reference's parts around a float32 generator at t*."""
    path = args.pretrained_generator_name_or_path
    source = {"revision": args.revision, "variant": args.variant} if path is None else {}
    generator = type(stock.transformer).from_pretrained(
        path or args.pretrained_model_name_or_path,
        subfolder="transformer",
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        **source,
    )
    options = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}
    return OneStepPipeline(
        tokenizer=stock.tokenizer,
        text_encoder=stock.text_encoder,
        vae=stock.vae,
        transformer=generator.requires_grad_(True),
        scheduler=DDPMScheduler.from_config(stock.scheduler.config, **options),
        timestep=timestep,
    )
