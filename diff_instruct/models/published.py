"""A network's weights as they are published, read tensor by tensor, and rounded as they are read."""

import hashlib
import json
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from diff_instruct.mistake import Mistake
from diff_instruct.models.roles import has_surrogate
from diff_instruct.models.rounding import DECODE, ENCODE, PARTS, Rounded, nf4_parts, round_empty, rounding
from diff_instruct.models.sharding import is_chosen
from diff_instruct.models.weight_files import generator_weights, options, variants


STATE = "quant_state.bitsandbytes__nf4"  # beside the codes of a weight that bitsandbytes rounded


def find(source, folder, name):
    """The path of a file of a model, in a folder or on the Hub; None if it has none."""
    if Path(source.path).is_dir():
        file = Path(source.path) / folder / name
        return file if file.is_file() else None
    try:
        return hf_hub_download(source.path, f"{folder}/{name}" if folder else name, **source.where)
    except EntryNotFoundError:
        return None


def shards(source, folder, first="named"):
    """The safetensors files of a network, one or several.

    Args:
        first: see `weight_files.options`.

    Raises:
        Mistake: if there are none.
    """
    variant = options(source, folder, first)["variant"]
    variant = f".{variant}" if variant else ""
    index = find(source, folder, SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{variant}.json"))
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [find(source, folder, name) for name in names]
    file = find(source, folder, SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{variant}.safetensors"))
    if file is None:
        raise Mistake(f"--base_quantization reads safetensors, but {source.path} has none in {folder or 'it'}")
    return [file]


class Published:
    """The tensors of safetensors files by name, each of them read when it is asked for.

    A file is opened anew for each, so that none of its pages stays in memory.
    """

    def __init__(self, files):
        self.file_of = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.file_of |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise Mistake(f"{file} is damaged ({error})") from None

    def __contains__(self, name):
        return name in self.file_of

    def read(self, name):
        """A tensor as it is in the file.

        Raises:
            Mistake: if there is none.
        """
        if name not in self:
            raise Mistake(f"the weights have no {name}: take a model in diffusers' layout")
        with safe_open(self.file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def parts(self, name):
        """Of a weight that is published in bitsandbytes' nf4 with scales rounded: its parts, as in `rounding.PARTS`.

        Raises:
            Mistake: if it is rounded in another way.
        """
        from bitsandbytes.functional import QuantState

        state = {k: self.read(k) for k in self.file_of if k.startswith(f"{name}.")}
        state = QuantState.from_dict(state, device="cpu")
        if state.quant_type != "nf4" or not state.nested or (state.blocksize, state.state2.blocksize) != (64, 256):
            raise Mistake(f"{name} is rounded otherwise than --base_quantization nf4 does: take a bfloat16 model")
        return {k: v.clone() for k, v in nf4_parts(self.read(name), state).items()}  # not in the file any longer

    def weight(self, name, shape):
        """A weight, decoded if it is published rounded."""
        if f"{name}.{STATE}" in self:
            return DECODE["nf4"](self.parts(name), shape, torch.float32)
        return self.read(name)


def published_generator(source, denoiser):
    """[`Published`] weights of the generator's network at a source.

    Raises:
        Mistake: if they are no safetensors.
    """
    kind, weights = generator_weights(source, denoiser)
    return Published([weights] if kind == "file" else shards(source, weights.get("subfolder", ""), "plain"))


def weight_reader(source, denoiser):
    """A function of name and shape that reads a weight of the generator's network at a source: from safetensors, and
    decoded if it is published rounded; or from pickles, which are mapped into memory where they can be, not read."""
    kind, weights = generator_weights(source, denoiser)
    files, folder = [weights], None if kind == "file" else weights.get("subfolder", "")
    if kind == "folder":
        names = (variants(source, folder) or {}).get(options(source, folder, "plain")["variant"], [])
        files = [find(source, folder, name) for name in names]
    if not files or any(str(file).endswith(".safetensors") for file in files):
        return published_generator(source, denoiser).weight
    state = {}
    for file in files:
        state |= torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    return lambda name, shape: state[name]


def is_published_rounded(config):
    """Whether a network's config says that its weights are bitsandbytes' nf4.

    Raises:
        Mistake: if they are rounded in another way.
    """
    how = config.get("quantization_config")
    if not how:
        return False
    if how.get("load_in_4bit") and how.get("bnb_4bit_quant_type") == "nf4":
        return True
    method = how.get("quant_method", "unknown")
    raise Mistake(f"its weights are published rounded ({method}); of such models only bitsandbytes' nf4 is taken")


def rounding_of(models, asked):
    """What each layer of the reference's network is rounded to, see `rounding`; or is published as, by its config.

    Args:
        models ([`Models`]).
        asked (`str`): of `--base_quantization`.

    Raises:
        Mistake: if it is published rounded in another way than nf4, or than is asked for.
    """
    network = models.networks[models.denoiser]
    try:
        published = is_published_rounded(network.config)
    except Mistake as error:
        raise Mistake(f"{models.reference.path}: {error}") from None
    if not published:
        return rounding(models.family, network, asked)
    if asked == "int8":
        raise Mistake(f"--base_quantization int8: {models.reference.path} is published in nf4, and is taken as it is")
    skipped = network.config["quantization_config"].get("llm_int8_skip_modules") or ()
    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name: "nf4" for name in linear if not any(word in name.split(".") or word == name for word in skipped)}


def check_rounding(args, models, roles):
    """Raises Mistake, in one line, for a rounded base that a role, the reference or the engine cannot have."""
    plan, asked = rounding_of(models, args.base_quantization), args.base_quantization
    if not plan and asked == "none":
        return
    what = f"--base_quantization {asked}" if asked != "none" else f"{models.reference.path}, published in nf4,"
    full = [role.title for role in roles if role.in_full]
    if full:
        ranks = ["--lora_rank", "--ta_lora_rank", *["--surrogate_lora_rank"] * has_surrogate(args)]
        raise Mistake(
            f"{what} needs all that is trained as LoRA on it, but the {' and the '.join(full)} would be trained in "
            f"full: give {' and '.join(ranks)}, for example 64"
        )
    if "nf4" in plan.values() and find_spec("bitsandbytes") is None:
        raise Mistake(f"{what} needs bitsandbytes: pip install bitsandbytes")
    if models.lora is not None:
        raise Mistake(f"{what} is taken from the files: no --reference_lora can be fused into it")
    if is_chosen():
        raise Mistake(f"{what} does not work with FSDP2, which divides weights: take data parallelism")
    check_safetensors(models.reference, models.denoiser, "named", what)
    if models.generator is not None and roles[0].base == roles[0].name:  # so its base is rounded, too
        kind, weights = generator_weights(models.generator, models.denoiser)
        if kind == "folder":
            check_safetensors(models.generator, weights.get("subfolder", ""), "plain", what)
        elif not weights.endswith(".safetensors"):
            raise Mistake(f"{what} reads safetensors, but {weights} is none: save it so")
    if not plan:
        raise Mistake(f"{what}: a {models.family.name} repeats no blocks whose layers could be rounded")


def check_safetensors(source, folder, first, what):
    """Raises Mistake if a network has weights, but none as safetensors."""
    names = (variants(source, folder) or {}).get(options(source, folder, first)["variant"])
    if names and not any(name.endswith(".safetensors") for name in names):
        raise Mistake(f"{what} reads safetensors, but {source.path}/{folder} has only {names[0]}: save it so")


def plan_of(published, network):
    """What each layer of a network is published as, by the files."""
    return {name: "nf4" for name, _ in network.named_modules() if f"{name}.weight.{STATE}" in published}


def empty_like(network, dtype):
    """The same network on the meta device; its buffers, which no file has, as `from_pretrained` with a dtype makes."""
    usual, config = torch.get_default_dtype(), dict(network.config)
    config.pop("quantization_config", None)
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return type(network).from_config(config)
    finally:
        torch.set_default_dtype(usual)


def load_rounded(network, plan, published, dtype, device="cpu"):
    """A frozen network with weights from files, rounded as a plan of `rounding` says, one tensor at a time.

    What is not rounded is in `dtype`, or in float32 where diffusers keeps it so. The network has an attribute
    `published`, and `digest`, of what was rounded and with what.

    Args:
        network: of the same class and config, for example on the meta device.
        published ([`Published`]): its weights.

    Raises:
        Mistake: if the files lack a weight.
    """
    network, check = round_empty(empty_like(network, dtype), plan), hashlib.sha256()
    keep, layers = set(network._keep_in_fp32_modules or ()), {name: network.get_submodule(name) for name in plan}
    codes = {f"{name}.{part}" for name, kind in plan.items() for part in PARTS[kind]}
    for name in sorted(network.state_dict()):
        where, _, key = name.rpartition(".")
        if key == "weight" and where in layers:
            kind = plan[where]
            parts = published.parts(name) if f"{name}.{STATE}" in published else encoded(published, name, kind, device)
            layers[where].hold({k: v.to(device) for k, v in parts.items()})
            for part in parts.values():
                check.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif name not in codes:
            tensor, owner = published.read(name), network.get_submodule(where)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if keep & set(name.split(".")) else dtype)
            tensor = tensor.to(device, copy=True)  # not in the file any longer
            if key in owner._buffers:
                owner._buffers[key] = tensor
            else:
                owner._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
    network.to(device)  # the buffers that no file has
    with_what = {"bitsandbytes": version("bitsandbytes")} if "nf4" in plan.values() else {}
    network.published, network.digest = (
        published,
        {"sha256": check.hexdigest(), "torch": torch.__version__, **with_what},
    )
    return network.eval()


def encoded(published, name, kind, device):
    """The parts of a weight, rounded where it will be."""
    return ENCODE[kind](published.read(name).to(device))


class Stored:
    """A weight as it is published; calling it reads it."""

    def __init__(self, published, name, shape):
        self.published, self.name, self.shape = published, name, torch.Size(shape)

    def __call__(self):
        return self.published.weight(self.name, self.shape)


def stored_state(network):
    """The state of the network that a rounded one, adapters or not, was read from: name to [`Stored`]."""
    codes, state = set(), {}
    for name, layer in network.named_modules():
        if isinstance(layer, Rounded):
            codes |= {f"{name}.{part}" for part in PARTS[layer.kind]}
            state[f"{name}.weight"] = layer.shape
    plain = {k: v.shape for k, v in network.state_dict().items() if k not in codes and ".lora_" not in k}
    names = {k.replace(".base_layer", ""): shape for k, shape in (plain | state).items()}
    return {k: Stored(network.published, k, shape) for k, shape in names.items()}


@contextmanager
def as_published(network):
    """Within: a rounded network computes with its weights as they are published, each read when it is used, and with
    its adapters, as what an export merges; without gradients. Any other network stays as it is."""
    named = {name: m for name, m in network.named_modules() if isinstance(m, Rounded)}
    for name, layer in named.items():
        layer.published = Stored(network.published, f"{name}.weight".replace(".base_layer", ""), layer.shape)
    try:
        yield
    finally:
        for layer in named.values():
            layer.published = None
