"""The models that are compared: one-step generators and multi-step references, described in one word each."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.constants import HF_MODULES_CACHE
from filelock import FileLock

from diff_instruct.families import FAMILIES, find_family
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import (
    ModelSource,
    check_resolution,
    empty_network,
    grid_of,
    read_index,
    sizes_of,
    text_encoders,
)
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.reference import sample
from diff_instruct.models.sources import read_models
from diff_instruct.models.weight_files import WEIGHT_FILES, check_folder, check_weights
from diff_instruct.prompts.cut import Cut, readings_of


OPTIONS = {"steps": int, "guidance": float, "base": str, "timestep": int, "noise": str, "variant": str}
EXAMPLE = "NAME=PATH, NAME=PATH,steps=25,guidance=4.5 or NAME=PATH,base=PIPELINE,timestep=399,noise=unit"


@dataclass(frozen=True)
class Contender:
    """A model, as `NAME=PATH[,option=value...]` says it.

    Args:
        name: what tables call it.
        path: folder or Hub id of a pipeline; with `base` also a network's folder or one weight file.
        steps, guidance: sample it as a diffusion model, with α_cfg = guidance (1 is none); for networks that take
            guidance as an input (FLUX.1-dev, Sana-Sprint) it is that one.
        base: the pipeline that the network is put into; default: its own.
        timestep: t*, where a one-step model that does not say it itself is evaluated.
        noise: what enters there, "unit" (z) or "scaled" (σ_t z).
        variant: of the pipeline's files, for example fp16.
    """

    name: str
    path: str
    steps: int | None = None
    guidance: float | None = None
    base: str | None = None
    timestep: int | None = None
    noise: str | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, entry):
        """From `NAME=PATH[,option=value...]`; a comma in a path is written `\\,`.

        Raises:
            Mistake: for an entry that cannot be read, or options that exclude each other.
        """
        name, _, rest = entry.partition("=")
        path, *options = (part.replace("\\,", ",") for part in re.split(r"(?<!\\),", rest))
        if not path or not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise Mistake(f"--models {entry}: write {EXAMPLE}; a name has letters, digits, - _ and . only")
        values = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in OPTIONS:
                in_path = r"; a comma in a path is written \," if Path(rest).exists() else ""
                raise Mistake(f"--models {entry}: unknown option `{key}`; known are {', '.join(OPTIONS)}{in_path}")
            try:
                values[key] = OPTIONS[key](value)
            except ValueError:
                raise Mistake(f"--models {entry}: {key} must be a number, but is `{value}`") from None
        contender = cls(name, path, **values)
        if (contender.steps is None) != (contender.guidance is None):
            raise Mistake(f"--models {entry}: steps and guidance belong together, as in steps=25,guidance=4.5")
        if contender.steps is not None and (contender.base or contender.timestep is not None or contender.noise):
            raise Mistake(f"--models {entry}: steps goes without base, timestep and noise")
        if contender.noise not in (None, "unit", "scaled"):
            raise Mistake(f"--models {entry}: noise must be unit or scaled, but is {contender.noise}")
        if contender.steps is not None and contender.steps < 2:
            raise Mistake(f"--models {entry}: steps must be at least 2; a one-step model has timestep=...")
        return contender

    def describe(self):
        """What it is, for the output: path and the options that were given."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "name"}

    def read(self, resolution, cache_dir):
        """The `Models` of a stock pipeline, see `read_models`."""
        reference = ModelSource(self.base or self.path, variant=self.variant, cache_dir=cache_dir)
        generator = ModelSource(self.path, variant=self.variant, cache_dir=cache_dir) if self.base else None
        timestep = None if self.timestep is None else [self.timestep]
        asked = {"timestep": timestep, "resolution": resolution, "input_noise": self.noise}
        return read_models(reference, generator, **asked)


def check(contender, resolution, cache_dir, trust_remote_code):
    """What can be known before weights load: `Models` of a stock pipeline, or None for a OneStepPipeline.

    Raises:
        Mistake: for a model that is not there, incomplete or not supported, options that it lacks or excludes, a
            resolution that it cannot make.
    """
    entry = f"--models {contender.name}={contender.path}"
    if contender.base is None:
        if contender.path.endswith(WEIGHT_FILES) or (Path(contender.path) / "config.json").is_file():
            if contender.steps is not None:
                raise Mistake(
                    f"{entry} is no folder of a whole pipeline, which steps=... samples; of one file diffusers makes "
                    "it: `from_single_file(FILE).save_pretrained(FOLDER)`"
                )
            raise Mistake(f"{entry} is a network only: say its pipeline, as in base=PIPELINE,timestep=399,noise=unit")
        index = read_index(contender.path, cache_dir=cache_dir)
        if is_one_step(index):
            if replace(contender, variant=None) != Contender(contender.name, contender.path):
                raise Mistake(f"{entry} is a OneStepPipeline, which knows its own t*: give no options")
            if not (Path(contender.path).is_dir() or trust_remote_code):
                raise Mistake(
                    f"{entry} brings its own pipeline_one_step.py, which would be run: look at it on the Hub, then "
                    "add --trust_remote_code"
                )
            check_one_step(contender.path, index, resolution, cache_dir, contender.variant)
            return None
        if index["_class_name"] in FAMILIES and contender.steps is None and contender.timestep is None:
            raise Mistake(
                f"{entry} is a {index['_class_name']}: say steps=... and guidance=..., or, if it is a one-step model, "
                "timestep=..."
            )
    models = contender.read(resolution, cache_dir)
    check_weights(models, "variant={}")
    return models


def is_one_step(index):
    """Whether a `model_index.json` is that of an exported OneStepPipeline."""
    return isinstance(index["_class_name"], list) and index["_class_name"][1] == "OneStepPipeline"


def check_one_step(path, index, resolution, cache_dir, variant=None):
    """Raises Mistake if a part of an exported pipeline is missing, or it cannot make the resolution."""
    networks = empty_networks(path, index, cache_dir)
    for name in networks:
        check_folder(ModelSource(path, variant=variant, cache_dir=cache_dir), name, "variant={}")
    if "family" in index:  # the first exports do not name it; their own code checks the size
        check_resolution(resolution, grid_of(find_family(index["family"], path), networks), path)


def empty_networks(path, index, cache_dir):
    """The networks of an exported pipeline, name to network, on the meta device."""
    names = [*(k for k in index if k in ("transformer", "unet", "vae")), *text_encoders(index)]
    return {k: empty_network(path, k, *index[k], cache_dir=cache_dir) for k in names if index[k][0]}


def cut_of(contender, models, cache_dir, prompts):
    """The [`Cut`] of a contender: how many of the prompts it reads in part only. `models` is what `check` returned.

    Of the first exports, which do not name their family, none are counted.
    """
    if models is None:
        index = read_index(contender.path, cache_dir=cache_dir)
        readings = []
        if "family" in index:
            family = find_family(index["family"], contender.path)
            networks = empty_networks(contender.path, index, cache_dir)
            length = index.get("max_sequence_length")
            readings = readings_of(contender.path, family, networks, length, cache_dir=cache_dir)
        cut = Cut(readings)
    else:
        cut = Cut.of(models)
    for prompt in prompts:
        cut.add(prompt)
    return cut


def load(contender, models, resolution, cache_dir, dtype, device):
    """(draw, latent shape) of a contender, its networks in `dtype` on `device`.

    `draw(prompts, n, z, generators)` gives pixels (B·n, 3, H, W) in [0, 1]: n images of each of B prompts, one after
    the other, that start at z (B·n, C, H/f, W/f); noise that is wanted later comes from the B·n generators.

    Args:
        models: what `check` returned.
        resolution: in pixels, of a side or WIDTHxHEIGHT; None is the model's own.
    """
    if models is None:
        Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
        with FileLock(
            Path(HF_MODULES_CACHE) / "one_step.lock"
        ):  # diffusers copies the code there while others read it
            pipe = DiffusionPipeline.from_pretrained(
                contender.path, variant=contender.variant, cache_dir=cache_dir, dtype=dtype, trust_remote_code=True
            )
        return one_step(pipe.to(device), resolution)
    stock = load_reference(models, dtype)
    if contender.steps is not None:
        return multi_step(models, stock.to(device), contender, resolution)
    pipe = load_generator(models, stock)
    if pipe.denoiser.dtype != dtype:
        pipe.denoiser.to(dtype)
    pipe.denoiser.requires_grad_(False).eval()
    return one_step(pipe.to(device), resolution)


def one_step(pipe, resolution):
    """`load` of a OneStepPipeline, through its public call."""
    pipe.set_progress_bar_config(disable=True)
    height, width = (sizes_of(resolution) or [(None, None)])[0]

    @torch.no_grad()
    def draw(prompts, n, z, generators):
        size = {"height": height, "width": width, "num_images_per_prompt": n}
        x0 = pipe(prompts, latents=z, generator=generators, output_type="latent", **size).images
        return pipe.decode(x0).clamp(0, 1)

    return draw, pipe.latent_shape(height, width)


def multi_step(models, stock, contender, resolution):
    """`load` of a stock pipeline that is sampled in several steps with its own scheduler."""
    grid, guidance = models.grid, contender.guidance
    if models.networks[models.denoiser].config.get("guidance_embeds"):  # what one calls guidance is its input
        models, guidance = replace(models, embedded_guidance=guidance), 1.0
    height, width = (sizes_of(resolution) or [(grid.side, grid.side)])[0]

    def draw(prompts, n, z, generators):
        options = contender.steps, guidance, (height, width)
        return sample(models, stock, prompts, z, *options, num_images=n, generator=generators)

    return draw, (grid.channels, height // grid.factor, width // grid.factor)
