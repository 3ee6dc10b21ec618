"""Where models are from, and what can be known of them without their weights: family, t*, sizes, mistakes."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from diff_instruct.families import find_family
from diff_instruct.mistake import Mistake
from pipeline_one_step import Family


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHT_FILES = (".safetensors", ".bin")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "SCMScheduler")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a Hub id or a folder; with the revision and the variant of its files on the Hub."""

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


@dataclass(frozen=True)
class Lora:
    """LoRA weights, as the stock pipeline's `load_lora_weights` takes them (folder, file, Hub id), and their scale."""

    path: str
    scale: float = 1.0
    cache_dir: str | None = None

    @classmethod
    def parse(cls, text, cache_dir=None):
        """From PATH_OR_ID[:SCALE]."""
        path, _, scale = text.rpartition(":")
        try:
            return cls(path, float(scale), cache_dir) if path else cls(text, cache_dir=cache_dir)
        except ValueError:
            return cls(text, cache_dir=cache_dir)


@dataclass(frozen=True)
class Models:
    """What is known of the models before weights load.

    Args:
        reference ([`ModelSource`]), generator, vae (the same, or None): where they are from.
        family (a subclass of [`Family`]): of the reference.
        networks: name to network of the reference, on the meta device, without memory for its weights.
        timestep: t*, where the generator is evaluated; or a list, if it takes several steps.
        input_noise: "unit" or "scaled", what enters there.
        lora ([`Lora`]): fused into the reference, or None.
        has_null: whether the reference knows ∅, so whether it can be guided.
        embedded_guidance: of networks that have guidance as an input; None is the family's.
    """

    reference: ModelSource
    generator: ModelSource | None
    vae: ModelSource | None
    family: type[Family]
    networks: dict
    timestep: int | list[int]
    input_noise: str
    lora: Lora | None = None
    has_null: bool = True
    embedded_guidance: float | None = None

    @property
    def denoiser(self):
        """Name of the network that denoises."""
        return self.family.denoiser

    @property
    def grid(self):
        """The `Grid` of its latents."""
        return grid_of(self.family, self.networks)


def grid_of(family, networks):
    """The `Grid` of the latents of a dictionary of networks."""
    return family.grid(networks[family.denoiser].config, networks["vae"].config)


def read_index(path, **where):
    """The `model_index.json` of a pipeline on the Hub or in a folder.

    Raises:
        Mistake: if there is none.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise Mistake(f"{path} has no model_index.json: give the folder of a whole diffusers pipeline")
    try:
        return DiffusionPipeline.load_config(path, **where)
    except OSError as error:
        raise Mistake(f"no pipeline can be read from {path}: {str(error).splitlines()[0]}") from None


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
        cls = getattr(transformers, class_name)
        file = cached_file(path, "config.json", subfolder=name, **where)
        if file is None:  # so says transformers, for a folder
            raise FileNotFoundError
        config = cls.config_class.from_json_file(file)
        with init_empty_weights():
            return cls(config)
    except OSError:
        raise Mistake(f"{path} has no {name}: expected {name}/config.json of a {class_name}") from None


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
    return 0, steps - 1


def read_networks(source, family, index, vae=None):
    """The networks of a pipeline, name to network, on the meta device.

    Raises:
        Mistake: if one is missing, or the VAE of another source has other latents.
    """
    names = [family.denoiser, "vae", *sorted(k for k in index if k.startswith("text_encoder"))]
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


def check_resolution(resolution, grid, path):
    """Raises Mistake for a resolution that the latents cannot make; None is the model's own."""
    if resolution is not None and (resolution < grid.multiple or resolution % grid.multiple):
        raise Mistake(f"--resolution {resolution} cannot be made by {path}: it must be a multiple of {grid.multiple}")


def read_models(
    reference,
    generator=None,
    vae=None,
    timestep=None,
    generator_steps=None,
    resolution=None,
    input_noise=None,
    embedded_guidance=None,
    lora=None,
):
    """Read the configs of the reference and of the generator.

    Args:
        reference, generator, vae ([`ModelSource`]): the last two may be None: as the reference.
        timestep (`list[int]`), generator_steps, resolution, input_noise, embedded_guidance: as asked for, or None.
        lora ([`Lora`]): of the reference, or None.

    Raises:
        Mistake: for a pipeline that is not there, not supported or not complete, a schedule that is not its family's,
            a t* outside it, a resolution that the latents cannot make, a VAE or a generator that does not fit.
    """
    path = reference.path
    index = read_index(path, **reference.where)
    name = index["_class_name"]
    family = find_family(name[1] if isinstance(name, list) else name, path)  # [module, class]: it brings its own code
    first, last = read_schedule(reference, family)
    networks = read_networks(reference, family, index, vae)
    network = networks[family.denoiser]
    check_resolution(resolution, grid_of(family, networks), path)

    trained_at, own_noise, own_guidance = [family.timestep], None, None
    if generator is not None:
        asked = timestep, generator_steps, input_noise
        trained_at, own_noise, own_guidance = check_generator(generator, family, network, *asked)
    if None not in (own_noise, input_noise) and own_noise != input_noise:
        raise Mistake(f"{generator.path} was trained with --input_noise {own_noise}: give the same, or none")
    timesteps = fixed_timesteps(timestep or trained_at, generator_steps)
    if not (first <= timesteps[-1] and timesteps[0] <= last):
        raise Mistake(
            f"--timestep {words(timesteps)} is outside the schedule of {path}: t* must be in {first}..{last}"
        )
    if len(set(timesteps)) < len(timesteps):
        raise Mistake(f"--timestep {timesteps[0]} is too low for {len(timesteps)} steps: {words(timesteps)}")
    at = timesteps if len(timesteps) > 1 else timesteps[0]
    if embedded_guidance is not None and not network.config.get("guidance_embeds"):
        raise Mistake(f"--embedded_guidance: the {family.denoiser} of {path} does not take guidance as an input")
    if lora is not None:
        check_lora(lora, family, network)
    guidance = own_guidance if embedded_guidance is None else embedded_guidance
    has_null = family.has_null and not index.get("is_distilled")  # FLUX.2 klein says so
    noise = own_noise or input_noise or "unit"
    return Models(reference, generator, vae, family, networks, at, noise, lora, has_null, guidance)


def models_of(args):
    """The [`Models`] that the training script's arguments ask for.

    Raises:
        Mistake: as `read_models`; and for guidance away from ∅ where the reference knows none.
    """
    cache_dir = args.cache_dir
    reference = ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, cache_dir)
    others = args.pretrained_generator_name_or_path, args.pretrained_vae_model_name_or_path
    generator, vae = (path and ModelSource(path, cache_dir=cache_dir) for path in others)
    asked = args.timestep, args.generator_steps, args.resolution, args.input_noise, args.embedded_guidance
    lora = args.reference_lora and Lora.parse(args.reference_lora, cache_dir)
    models = read_models(reference, generator, vae, *asked, lora)
    scales = {"cfg_scale": args.cfg_scale} | (
        {"pretrain_cfg_scale": args.pretrain_cfg_scale} if args.pretrain_steps else {}
    )
    for name, scale in scales.items():
        if scale != 1 and not models.has_null:
            raise Mistake(f"--{name} {scale:g}: {reference.path} knows no ∅ to be guided away from: give --{name} 1")
    return models


def fixed_timesteps(named, n):
    """The generator's timesteps, a list: those named; or, from only one, n of them, t* (n − k)/n for k = 0..n − 1.

    So they are evenly spaced between t* and 0, and the first step is that of a one-step generator; with t* = 999 and
    n = 4 they are DMD2's 999, 749, 499, 249.
    """
    return named if len(named) > 1 or n is None else [named[0] * (n - k) // n for k in range(n)]


def words(timesteps):
    """Timesteps as one types them."""
    return " ".join(map(str, timesteps))


def generator_weights(source, denoiser):
    """Where the generator's weights are: ("file", path) of one file, or ("folder", arguments of `from_pretrained`).

    Raises:
        Mistake: if nothing is there.
    """
    path = source.path
    if path.endswith(WEIGHT_FILES):
        if Path(path).is_file():
            return "file", path
        owner, *rest = path.split("/", 2)
        if len(rest) < 2 or owner in ("", ".", ".."):
            raise Mistake(f"--pretrained_generator_name_or_path: there is no file {path}")
        try:
            return "file", hf_hub_download(f"{owner}/{rest[0]}", rest[1], cache_dir=source.cache_dir)
        except OSError as error:
            raise Mistake(f"{path} can be neither found nor downloaded: {str(error).splitlines()[0]}") from None
    if Path(path).is_dir() and (Path(path) / "config.json").is_file():
        return "folder", {"pretrained_model_name_or_path": path}
    if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
        raise Mistake(
            f"--pretrained_generator_name_or_path: {path} is neither a pipeline (model_index.json), nor a network "
            f"(config.json), nor a file that ends in {' or '.join(WEIGHT_FILES)}"
        )
    return "folder", {"pretrained_model_name_or_path": path, "subfolder": denoiser}


def generator_shapes(source, denoiser, network):
    """(shapes of the generator's weights by name, its `model_index.json` or {}), without loading it.

    Raises:
        Mistake: if it is not there or of another class.
    """
    path = source.path
    kind, weights = generator_weights(source, denoiser)
    if kind == "file":
        return weight_shapes(weights), {}
    index = {}
    if "subfolder" in weights:
        index = read_index(path, cache_dir=source.cache_dir)
        if index.get(denoiser, [None])[0] is None:
            raise Mistake(f"{path} has no {denoiser}, which a generator for this reference needs")
    try:
        config = type(network).load_config(**weights, cache_dir=source.cache_dir)
    except OSError:
        raise Mistake(f"{path} has no {denoiser}/config.json") from None
    if config["_class_name"] != type(network).__name__:
        raise Mistake(f"{path} is a {config['_class_name']}, but the reference a {type(network).__name__}")
    with init_empty_weights():
        return {k: tuple(v.shape) for k, v in type(network).from_config(config).state_dict().items()}, index


def check_generator(source, family, network, timestep, generator_steps, input_noise):
    """(timesteps, input noise, embedded guidance or None) of the given generator, whose shapes must be those of the
    reference's network. Without words of its own, a model that matches flows starts at σ = 1.

    Raises:
        Mistake: if it does not fit, or nobody says its t* and what enters there, or the arguments say another.
    """
    path, expected = source.path, {k: tuple(v.shape) for k, v in network.state_dict().items()}
    shapes, index = generator_shapes(source, family.denoiser, network)
    wrong = sorted(k for k in expected.keys() | shapes.keys() if expected.get(k) != shapes.get(k))
    if wrong:
        raise Mistake(
            f"{path} does not fit the reference's {family.denoiser}: {len(wrong)} of {len(expected)} weights are "
            f"missing, not expected or of another shape, such as {', '.join(wrong[:3])}"
        )
    trained_at, guidance = index.get("timestep"), index.get("embedded_guidance")
    if trained_at is None and family.flow:
        timestep = timestep or [family.timestep]
        if timestep[0] == family.timestep:
            input_noise = input_noise or "unit"  # the same as scaled
    if trained_at is None and timestep is None:
        raise Mistake(f"{path} names no t*: give the timestep that it is evaluated at with --timestep")
    if trained_at is None and input_noise is None:
        raise Mistake(
            f"{path} does not say what enters at t*: give --input_noise unit (z; DMD2, DI*) or scaled (σ_t z; SIM, "
            "SiD-LSG)"
        )
    if trained_at is None:
        return timestep, input_noise, guidance
    trained_at = trained_at if isinstance(trained_at, list) else [trained_at]
    asked = fixed_timesteps(timestep or trained_at, generator_steps)
    if trained_at not in (asked, asked[:1]) or generator_steps not in (None, len(asked)):
        own = words(trained_at)
        raise Mistake(f"{path} was trained at t* = {own}: give the same --timestep and --generator_steps, or none")
    return trained_at, index.get("input_noise", "unit"), guidance


def check_lora(lora, family, network):
    """Raises Mistake if LoRA weights are not there, or not for this network alone."""
    where = f"--reference_lora {lora.path}"
    if not family.has_lora_files():
        raise Mistake(f"{where}: a {family.name} cannot load LoRA weights")
    try:
        state = family.stock().lora_state_dict(lora.path, cache_dir=lora.cache_dir)
    except (OSError, ValueError) as error:
        raise Mistake(f"{where} cannot be read: {str(error).splitlines()[0]}") from None
    state = state[0] if isinstance(state, tuple) else state
    prefix, modules = family.denoiser + ".", {name for name, _ in network.named_modules()}
    layers = {k.removeprefix(prefix).split(".lora")[0].replace(".processor", "") for k in state if ".lora_A" in k}
    others = sorted({k for k in state if not k.startswith(prefix)} | (layers - modules))
    if others or not layers:
        what = f"it also holds {others[0]}" if others else "it holds no LoRA weights"
        raise Mistake(f"{where} is not for the {family.denoiser} of a {family.name}: {what}")


def weight_shapes(file):
    """Names and shapes of the weights in a .safetensors or .bin file.

    Raises:
        Mistake: if it is damaged, or a pickle that holds more than tensors.
    """
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as f:
                return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
        return {k: tuple(v.shape) for k, v in torch.load(file, map_location="meta", weights_only=True).items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise Mistake(f"{file} is damaged or holds more than named tensors ({reason})") from None
