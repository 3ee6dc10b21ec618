"""What can be known of the models without their weights: family, t*, sizes, and mistakes in the arguments."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers.utils import cached_file

from diff_instruct.mistake import Mistake


# The stock pipelines, with their network and where a generator is evaluated if nobody says: σ/α = 2.0 (as in DMD),
# 2.5 (as in SiD-LSG) and 1.2 (as in DMD2) on their schedules.
FAMILIES = {
    "PixArtAlphaPipeline": ("transformer", 400),
    "StableDiffusionPipeline": ("unet", 625),
    "StableDiffusionXLPipeline": ("unet", 399),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Models:
    """The reference's parts, as empty networks on the meta device, and where the generator is evaluated.

    Args:
        family: class of the stock pipeline.
        denoiser: name of its network, "transformer" or "unet".
        networks: name to network, without memory for its weights.
        timestep: t*; or a list, if the generator takes several steps.
    """

    family: str
    denoiser: str
    networks: dict
    timestep: int | list[int]


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


def read_models(args):
    """Read the configs of the reference and of the generator.

    Raises:
        Mistake: for a pipeline that is not there, not supported or not complete, a schedule that is not a
            variance-preserving one, a t* outside it, a resolution that the VAE cannot make, a generator that does not
            fit.
    """
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    index = read_index(path, **where)
    family = index["_class_name"]
    if isinstance(family, list):  # [module, class] of a pipeline that brings its own code
        family = family[1]
    if family not in FAMILIES:
        raise Mistake(f"{path} is a {family}; supported are {', '.join(FAMILIES)}")
    denoiser, default_timestep = FAMILIES[family]
    if args.enable_xformers_memory_efficient_attention and denoiser != "unet":
        raise Mistake(f"--enable_xformers_memory_efficient_attention is for UNets, but {path} is a {family}")

    try:
        schedule = DDPMScheduler.load_config(path, subfolder="scheduler", **where)
    except OSError:
        raise Mistake(f"{path} has no scheduler: expected scheduler/scheduler_config.json") from None
    prediction_type = schedule.get("prediction_type", "epsilon")
    if "beta_schedule" not in schedule or prediction_type not in PREDICTION_TYPES:
        raise Mistake(
            f"{path} has a {schedule['_class_name']} with prediction type {prediction_type}; supported are schedules "
            f"with betas (variance-preserving) and {', '.join(PREDICTION_TYPES)}"
        )

    names = [denoiser, "vae", *sorted(k for k in index if k.startswith("text_encoder"))]
    if "text_encoder" not in names or any(index.get(name, [None])[0] is None for name in names):
        missing = [n for n in (denoiser, "vae", "text_encoder", "text_encoder_2") if index.get(n, [None])[0] is None]
        raise Mistake(f"{path} has no {missing[0]}: its model_index.json must name one")
    networks = {name: empty_network(path, name, *index[name], **where) for name in names}

    config, blocks = networks[denoiser].config, networks["vae"].config.block_out_channels
    multiple = 2 ** (len(blocks) - 1) * config.get("patch_size", 1)
    if args.resolution is not None and (args.resolution < multiple or args.resolution % multiple):
        raise Mistake(f"--resolution {args.resolution} cannot be made: it must be a multiple of {multiple}")

    trained_at = [default_timestep]
    if args.pretrained_generator_name_or_path is not None:
        trained_at = check_generator(args, denoiser, networks[denoiser])
    timesteps = fixed_timesteps(args.timestep or trained_at, args.generator_steps)
    last = schedule.get("num_train_timesteps", 1000) - 1
    if not (0 <= timesteps[-1] and timesteps[0] <= last):
        raise Mistake(f"--timestep {words(timesteps)} is outside the schedule of {path}: t* must be in 0..{last}")
    if len(set(timesteps)) < len(timesteps):
        raise Mistake(f"--timestep {timesteps[0]} is too low for {len(timesteps)} steps: {words(timesteps)}")
    return Models(family, denoiser, networks, timesteps if len(timesteps) > 1 else timesteps[0])


def fixed_timesteps(named, n):
    """The generator's timesteps, a list: those named; or, from only one, n of them, t* (n − k)/n for k = 0..n − 1.

    So they are evenly spaced between t* and 0, and the first step is that of a one-step generator; with t* = 999 and
    n = 4 they are DMD2's 999, 749, 499, 249.
    """
    return named if len(named) > 1 or n is None else [named[0] * (n - k) // n for k in range(n)]


def words(timesteps):
    """Timesteps as one types them."""
    return " ".join(map(str, timesteps))


def generator_source(args, denoiser):
    """Where the generator's weights are: ("file", path) of one file, or ("folder", arguments of `from_pretrained`).

    Raises:
        Mistake: if nothing is there.
    """
    path = args.pretrained_generator_name_or_path
    if path.endswith(WEIGHT_FILES):
        if Path(path).is_file():
            return "file", path
        owner, *rest = path.split("/", 2)
        if len(rest) < 2 or owner in ("", ".", ".."):
            raise Mistake(f"--pretrained_generator_name_or_path: there is no file {path}")
        try:
            return "file", hf_hub_download(f"{owner}/{rest[0]}", rest[1], cache_dir=args.cache_dir)
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


def check_generator(args, denoiser, reference):
    """The timesteps of the given generator, after comparing its shapes with those of the reference's network.

    Raises:
        Mistake: if it does not fit, or nobody says its t*, or the arguments say another.
    """
    path = args.pretrained_generator_name_or_path
    kind, source = generator_source(args, denoiser)
    expected, trained_at = {k: tuple(v.shape) for k, v in reference.state_dict().items()}, None
    if kind == "file":
        shapes = weight_shapes(source)
    else:
        if "subfolder" in source:
            index = read_index(path, cache_dir=args.cache_dir)
            trained_at = index.get("timestep")
            if index.get(denoiser, [None])[0] is None:
                raise Mistake(f"{path} has no {denoiser}, which a generator for this reference needs")
        try:
            config = type(reference).load_config(**source, cache_dir=args.cache_dir)
        except OSError:
            raise Mistake(f"{path} has no {denoiser}/config.json") from None
        if config["_class_name"] != type(reference).__name__:
            raise Mistake(f"{path} is a {config['_class_name']}, but the reference a {type(reference).__name__}")
        with init_empty_weights():
            shapes = {k: tuple(v.shape) for k, v in type(reference).from_config(config).state_dict().items()}
    wrong = sorted(k for k in expected.keys() | shapes.keys() if expected.get(k) != shapes.get(k))
    if wrong:
        raise Mistake(
            f"{path} does not fit the reference's {denoiser}: {len(wrong)} of {len(expected)} weights are missing, "
            f"not expected or of another shape, such as {', '.join(wrong[:3])}"
        )
    if trained_at is None and args.timestep is None:
        raise Mistake(f"{path} names no t*: give the timestep that it is evaluated at with --timestep")
    if trained_at is None:
        return args.timestep
    trained_at = trained_at if isinstance(trained_at, list) else [trained_at]
    asked = fixed_timesteps(args.timestep or trained_at, args.generator_steps)
    if trained_at not in (asked, asked[:1]) or args.generator_steps not in (None, len(asked)):
        own = words(trained_at)
        raise Mistake(f"{path} was trained at t* = {own}: give the same --timestep and --generator_steps, or none")
    return trained_at


def weight_shapes(file):
    """Names and shapes of the weights in a .safetensors or .bin file."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
    return {k: tuple(v.shape) for k, v in torch.load(file, map_location="meta", weights_only=True).items()}
