"""The files that weights are in: which a model has, in which variant, and whether they can be read at all."""

import pickle
import re
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open

from diff_instruct.mistake import Mistake


WEIGHT_FILES = (".safetensors", ".bin")
# As diffusers and transformers name them: model[.variant][-00001-of-00002].safetensors, or number and variant swapped.
SHARD = r"(?:-\d+-of-\d+)?"
NAME = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model){SHARD}(?:\.([A-Za-z]\w*))?{SHARD}\.(?:safetensors|bin)"
)
POINTER = b"version https://git-lfs"


@lru_cache
def files_on_hub(repo, revision):
    """Paths of all files of a repository; None if it cannot be asked."""
    try:
        return tuple(list_repo_files(repo, revision=revision))
    except (OSError, HTTPError, HFValidationError):
        return None


def variants(source, folder=""):
    """{variant, None for plain: names of its weight files} in a folder of a model; None if nobody can say.

    Args:
        source ([`ModelSource`]): of the model.
        folder: of a part of it, such as "vae".
    """
    if Path(source.path).exists():
        place = Path(source.path) / folder
        names = [path.name for path in place.iterdir()] if place.is_dir() else []
    else:
        paths = files_on_hub(source.path, source.revision)
        if paths is None:
            return None
        names = [path.rpartition("/")[2] for path in paths if path.rpartition("/")[0] == folder]
    found = {}
    for name in sorted(names):
        match = NAME.fullmatch(name)
        if match:
            found.setdefault(match[1], []).append(name)
    return found


def options(source, folder="", first="named"):
    """Arguments of `from_pretrained` beside path and subfolder: revision, cache and the variant that is there.

    As in diffusers' pipelines, a part that lacks the variant has plain files instead.

    Args:
        first: "named": the source's variant, then plain files; "plain": the other way round.
    """
    found, order = variants(source, folder), [source.variant, None]
    order = order if first == "named" else order[::-1]
    return {**source.where, "variant": next((v for v in order if found is None or v in found), order[0])}


def check_folder(source, folder="", say="--variant {}", first="named"):
    """Whether the weights in a folder of a model can be loaded.

    Args:
        say: how the variant is named, with a place for it.

    Raises:
        Mistake: if there are none, or only those of another variant; if a local file is a pointer or is damaged.
    """
    found, where = variants(source, folder), f"{source.path}/{folder}".rstrip("/")
    if found is None:
        return
    if not found:
        raise Mistake(f"{where} has no weights: expected a .safetensors or .bin file as diffusers names it")
    variant = options(source, folder, first)["variant"]
    if variant not in found:
        others = ", ".join(name or "plain" for name in found)
        raise Mistake(f"{where} has weights of the variant {others} only: give {say.format(next(iter(found)))}")
    names = [name for name in found[variant] if name.endswith(".safetensors")] or found[variant]  # what is read
    of = {name: re.search(r"-of-(\d+)", name) for name in names}
    for name in names:
        if of[name] and len(names) < int(of[name][1]):
            raise Mistake(f"{where} is incomplete: {len(names)} of {int(of[name][1])} files are there, such as {name}")
        if Path(source.path).exists():
            check_file(str(Path(source.path) / folder / name))


def check_weights(models, say="--variant {}", config_suffices=False):
    """Whether the weights of all [`Models`] are there and can be loaded, before any of them is.

    Args:
        config_suffices: a reference without any weights is one whose size alone is asked for.

    Raises:
        Mistake: see `check_folder`.
    """
    own = [name for name in models.networks if name != "vae" or models.vae is None]
    if not (config_suffices and all(variants(models.reference, name) == {} for name in own)):
        for name in own:
            check_folder(models.reference, name, say)
    if models.vae is not None:
        check_folder(models.vae, say=say, first="plain")
    if models.generator is not None:
        kind, weights = generator_weights(models.generator, models.denoiser)
        if kind == "folder":
            check_folder(models.generator, weights.get("subfolder", ""), say, first="plain")


def file_on_hub(path, cache_dir, flag):
    """Where the file owner/name/file of the Hub is, downloaded if it was not.

    Raises:
        Mistake: if it cannot be had.
    """
    owner, *rest = path.split("/", 2)
    if len(rest) < 2 or owner in ("", ".", ".."):
        raise Mistake(f"{flag}: there is no file {path}")
    try:
        return hf_hub_download(f"{owner}/{rest[0]}", rest[1], cache_dir=cache_dir)
    except OSError as error:
        raise Mistake(f"{path} can be neither found nor downloaded: {str(error).splitlines()[0]}") from None


def generator_weights(source, denoiser):
    """Where the generator's weights are: ("file", path) of one file, or ("folder", arguments of `from_pretrained`).

    Raises:
        Mistake: if nothing is there, or a file without the weights.
    """
    path = source.path
    if path.endswith(WEIGHT_FILES):
        if Path(path).is_file():
            check_file(path)
            return "file", path
        return "file", file_on_hub(path, source.cache_dir, "--pretrained_generator_name_or_path")
    if Path(path).is_dir() and (Path(path) / "config.json").is_file():
        return "folder", {"pretrained_model_name_or_path": path}
    if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
        raise Mistake(
            f"--pretrained_generator_name_or_path: {path} is neither a pipeline (model_index.json), nor a network "
            f"(config.json), nor a file that ends in {' or '.join(WEIGHT_FILES)}"
        )
    return "folder", {"pretrained_model_name_or_path": path, "subfolder": denoiser}


def check_file(path):
    """Raises Mistake if a local file is a git-lfs pointer, or a safetensors file that is cut short or is none."""
    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise Mistake(f"{path} is a pointer of git-lfs, without the weights: run `git lfs pull` in its repository")
    if str(path).endswith(".safetensors"):
        weight_shapes(path)


def weight_shapes(file):
    """Names and shapes of the weights in a .safetensors or .bin file.

    Raises:
        Mistake: if it is damaged, or a pickle that holds more than tensors, or has them under a key.
    """
    file = str(file)
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as f:
                return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
        state = torch.load(file, map_location="meta", weights_only=True)
        nested = [k for k, v in state.items() if isinstance(v, dict) and any(map(torch.is_tensor, v.values()))]
        if not nested:
            return {k: tuple(v.shape) for k, v in state.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise Mistake(f"{file} is damaged or holds more than named tensors ({reason})") from None
    keys = " and ".join(map(repr, nested))
    raise Mistake(f"{file} has its weights under the key {keys}: save what is under one by itself")


def misfit(shapes, expected, wrong):
    """In words, how weights are not those that are expected; {name: shape}, and the names that differ."""
    if any("lora" in name.lower() for name in shapes):
        return "it is a LoRA: fuse it into the network that it is for, and give that one"
    for prefix in {name.removesuffix(own) for name in shapes for own in list(expected)[:1] if name.endswith(own)}:
        if prefix and expected.items() <= {name.removeprefix(prefix): shape for name, shape in shapes.items()}.items():
            return f"every name begins with {prefix!r}: save the weights without it"
    if any(name.startswith("model.diffusion_model.") for name in shapes):
        return "it is in the layout of the original code, not of diffusers: convert it with `from_single_file`"
    count = f"{len(wrong)} of {len(expected)} weights are missing, not expected or of another shape"
    return f"{count}, such as {', '.join(wrong[:3])}"
