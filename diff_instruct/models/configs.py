"""Configs of pipelines, without their weights: what parts they have, their schedule, networks and latents."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import transformers
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, DiffusionPipeline
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from diff_instruct.mistake import Mistake
from pipeline_one_step import Schedule


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "SCMScheduler")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a Hub id or a folder; with the revision and the variant of its files."""

    path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None

    @property
    def where(self):
        """Arguments of `load_config` beside the path."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def options(self):
        """Arguments of `from_pretrained` beside the path."""
        return {**self.where, "variant": self.variant}


def read_index(path, **where):
    """The `model_index.json` of a pipeline on the Hub or in a folder.

    Raises:
        Mistake: if there is none.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise Mistake(f"{path} has no model_index.json: give the folder of a whole diffusers pipeline")
    of_no_hub = str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1  # owner/name, or a name
    if of_no_hub and not Path(path).exists():
        raise Mistake(f"no pipeline can be read from {path}: there is no such folder")
    try:
        return DiffusionPipeline.load_config(path, **where)
    except OSError as error:
        raise Mistake(f"no pipeline can be read from {path}: {str(error).splitlines()[0]}") from None


def class_of(library, class_name):
    """The class of a text encoder or tokenizer, as an index names it: of transformers, or a pipeline's own."""
    return getattr(transformers if library == "transformers" else getattr(diffusers.pipelines, library), class_name)


def empty_network(path, name, library, class_name, **where):
    """A component of a pipeline, from its config alone.

    Raises:
        Mistake: if the pipeline has no such component.
    """
    try:
        if library == "diffusers":
            cls = getattr(diffusers, class_name)
            with init_empty_weights():
                return cls.from_config(cls.load_config(path, subfolder=name, **where))
        cls = class_of(library, class_name)
        file = cached_file(path, "config.json", subfolder=name, **where)
        if file is None:  # so says transformers, for a folder
            raise FileNotFoundError
        config = cls.config_class.from_json_file(file)
        with init_empty_weights(), no_init_weights():
            return cls(config)
    except OSError:
        raise Mistake(f"{path} has no {name}: expected {name}/config.json of a {class_name}") from None


def grid_of(family, networks):
    """The `Grid` of the latents of a dictionary of networks."""
    return family.grid(networks[family.denoiser].config, networks["vae"].config)


def read_schedule(source, family):
    """(first, last) of the timesteps that a generator may be evaluated at, from the reference's config alone.

    Raises:
        Mistake: if there is no scheduler, or one that is not of the family's kind.
    """
    try:
        schedule = DDPMScheduler.load_config(source.path, subfolder="scheduler", **source.where)
    except OSError:
        raise Mistake(f"{source.path} has no scheduler: expected scheduler/scheduler_config.json") from None
    prediction_type, steps = schedule.get("prediction_type", "epsilon"), schedule.get("num_train_timesteps", 1000)
    if family.flow:
        if schedule["_class_name"] not in FLOW_SCHEDULERS and not schedule.get("use_flow_sigmas"):
            raise Mistake(
                f"{source.path} has a {schedule['_class_name']}; a {family.name} needs a scheduler for flow matching, "
                f"such as {FLOW_SCHEDULERS[0]}"
            )
        return 1, steps
    if "beta_schedule" not in schedule or prediction_type not in PREDICTION_TYPES:
        raise Mistake(
            f"{source.path} has a {schedule['_class_name']} with prediction type {prediction_type}; supported are "
            f"schedules with betas (variance-preserving) and {', '.join(PREDICTION_TYPES)}"
        )
    schedule = Schedule(DDPMScheduler.from_config(schedule))
    return schedule.first, schedule.last


def text_encoders(index):
    """Names of the text encoders in a `model_index.json`; a setting may begin with the same word (Krea 2's does)."""
    return sorted(k for k, v in index.items() if k.startswith("text_encoder") and isinstance(v[0], str | None))


def read_networks(source, family, index, vae=None):
    """The networks of a pipeline, name to network, on the meta device.

    Raises:
        Mistake: if one is missing, or the VAE of another source has other latents.
    """
    encoders = [k for k in text_encoders(index) if index[k][0] or k not in family.optional]
    names = [family.denoiser, "vae", *encoders]
    if "text_encoder" not in names or any(index.get(name, [None])[0] is None for name in names):
        missing = [n for n in (*names, "text_encoder", "text_encoder_2") if index.get(n, [None])[0] is None]
        raise Mistake(f"{source.path} has no {missing[0]}: its model_index.json must name one")
    networks = {name: empty_network(source.path, name, *index[name], **source.where) for name in names}
    if vae is not None:
        own, own_config, cls = grid_of(family, networks), networks["vae"].config, type(networks["vae"])
        try:
            config = cls.load_config(vae.path, **vae.where)
        except OSError:
            raise Mistake(
                f"--pretrained_vae_model_name_or_path {vae.path}: no config.json of a VAE is there"
            ) from None
        with init_empty_weights():
            networks["vae"] = cls.from_config(config)
        channels = [c.get("latent_channels", c.get("z_dim")) for c in (own_config, networks["vae"].config)]
        if grid_of(family, networks).factor != own.factor or channels[0] != channels[1]:
            raise Mistake(f"--pretrained_vae_model_name_or_path {vae.path} has other latents than {source.path}")
    return networks


def sizes_of(resolution):
    """[(height, width)] of `--resolution`: a side, WIDTHxHEIGHT, or a list of these; [] where it is None."""
    if resolution is None:
        return []
    given = resolution if isinstance(resolution, list) else [resolution]
    return [(size, size) if isinstance(size, int) else tuple(map(int, size.split("x")))[::-1] for size in given]


def check_resolution(resolution, grid, path):
    """Raises Mistake for a resolution that the latents cannot make; None is the model's own."""
    for height, width in sizes_of(resolution):
        if any(side < grid.multiple or side % grid.multiple for side in (height, width)):
            named = height if height == width else f"{width}x{height}"
            raise Mistake(f"--resolution {named} cannot be made by {path}: it must be a multiple of {grid.multiple}")
