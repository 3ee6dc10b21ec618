"""What a generator starts from: weights of its own, its timesteps, LoRA of the reference; and whether they fit."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import init_empty_weights
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import PeftConfig, PeftType
from peft.utils.save_and_load import load_peft_weights

from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import read_index
from diff_instruct.models.weight_files import (
    WEIGHT_FILES,
    check_file,
    file_on_hub,
    generator_weights,
    misfit,
    weight_shapes,
)


@dataclass(frozen=True)
class Lora:
    """LoRA weights and their scale: as the stock pipeline's `load_lora_weights` takes them (folder, file, Hub id), one
    file of several on the Hub (owner/name/file), or a folder that peft wrote."""

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

    def here(self, flag):
        """The same, its file downloaded if it is named as one on the Hub.

        Raises:
            Mistake: if it is not there.
        """
        if not self.path.endswith(WEIGHT_FILES) or Path(self.path).exists():
            return self
        return replace(self, path=file_on_hub(self.path, self.cache_dir, flag))

    @property
    def peft_config(self):
        """The [`PeftConfig`] of what peft wrote, which holds its α; None of other LoRA weights."""
        if Path(self.path).is_file():
            return None
        try:
            return PeftConfig.from_pretrained(self.path, cache_dir=self.cache_dir)
        except ValueError:  # so says peft where there is none
            return None


def fixed_timesteps(named, n):
    """The generator's timesteps, a list: those named; or, from only one, n of them, t* (n − k)/n for k = 0..n − 1.

    So they are evenly spaced between t* and 0, and the first step is that of a one-step generator; with t* = 999 and
    n = 4 they are DMD2's 999, 749, 499, 249.
    """
    return named if len(named) > 1 or n is None else [named[0] * (n - k) // n for k in range(n)]


def words(timesteps):
    """Timesteps as one types them."""
    return " ".join(map(str, timesteps))


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
        raise Mistake(f"{path} does not fit the reference's {family.denoiser}: {misfit(shapes, expected, wrong)}")
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


def check_lora(lora, family, network, flag="--reference_lora"):
    """The layers that LoRA weights are for, each with their rank there.

    Raises:
        Mistake: if they are not there, or not for this network alone.
    """
    for file in (lora.path, *Path(lora.path).glob("*.safetensors")):
        check_file(file)
    where, config = f"{flag} {lora.path}", lora.peft_config
    if config is not None and config.peft_type != PeftType.LORA:
        raise Mistake(f"{where} holds adapters of the kind {config.peft_type.value}, not LoRA")
    if config is not None:
        state, prefix = load_peft_weights(lora.path, device="cpu", cache_dir=lora.cache_dir), "base_model.model."
    elif not family.has_lora_files():
        raise Mistake(f"{where}: a {family.name} loads no LoRA files; a folder that peft wrote can be taken")
    else:
        try:
            state, prefix = family.stock().lora_state_dict(lora.path, cache_dir=lora.cache_dir), family.denoiser + "."
        except (OSError, ValueError) as error:
            raise Mistake(f"{where} cannot be read: {str(error).splitlines()[0]}") from None
    state = state[0] if isinstance(state, tuple) else state
    if family.denoiser == "unet" and config is None:  # from the several kinds of names that UNets' files have
        state = convert_unet_state_dict_to_peft(state)
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in network.named_parameters() if p.ndim > 1}
    others, layers = [], {}
    for key, value in state.items():
        layer, _, part = key.removeprefix(prefix).replace(".processor", "").partition(".lora")
        axis = 1 if part.startswith("_A") else 0 if part.startswith("_B") else None
        if axis == 1:
            layers[layer] = value.shape[0]
        if not key.startswith(prefix) or layer not in shapes:
            others.append(f"it also holds {key if not key.startswith(prefix) else layer}")
        elif axis is not None and value.shape[axis] != shapes[layer][axis]:
            others.append(f"its {layer} is {value.shape[axis]} wide, not {shapes[layer][axis]}")
    if others or not layers:
        what = min(others) if others else "it holds no LoRA weights"
        raise Mistake(f"{where} is not for the {family.denoiser} of a {family.name}: {what}")
    return layers


def check_start(lora, family, network, rank):
    """The layers of LoRA weights that the generator's adapters are to start as.

    Raises:
        Mistake: as `check_lora`, and if they are of a larger rank than the adapters.
    """
    layers = check_lora(lora, family, network, "--pretrained_generator_lora")
    own = max(layers.values())
    if own > rank:
        raise Mistake(f"--pretrained_generator_lora {lora.path} is of rank {own}: give --lora_rank {own} or more")
    return tuple(layers)
