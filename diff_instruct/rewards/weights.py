"""Finds and reads published checkpoints: on the Hub, or where `--reward_checkpoint name=path` says.

Only safetensors files and pickles that hold nothing but tensors (`weights_only=True`) are read.
"""

import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPModel

from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import ModelSource
from diff_instruct.models.weight_files import check_file, check_folder


def missing(name, what, repo, reason):
    """The error for a checkpoint that is not at hand."""
    reason = str(reason).split("\n")[0].strip()
    return Mistake(
        f"reward `{name}` needs {what} from https://huggingface.co/{repo}, which cannot be had ({reason}) "
        f"Download it and give its place: --reward_checkpoint {name}=PATH"
    )


def find(name, path, repo, filename, cache_dir=None):
    """The file `filename`: `path` itself or in the folder `path`; without a path, from the Hub.

    Raises:
        Mistake: if it is not there.
    """
    if path is None:
        try:
            return Path(hf_hub_download(repo, filename, cache_dir=cache_dir))
        except OSError as error:
            raise missing(name, filename, repo, error) from None
    path = Path(path)
    file = path / filename if path.is_dir() else path
    if not file.is_file():
        raise Mistake(f"--reward_checkpoint {name}={path}: no file {file}; {filename} is from {repo} on the Hub")
    return file


def read(file):
    """The tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises:
        Mistake: for a pickle with code in it, or a damaged file.
    """
    check_file(file)
    with unreadable(file):
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def unreadable(file):
    """Within: what is raised by a file that cannot be read becomes a Mistake."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise Mistake(f"{file} is damaged or holds more than tensors ({reason})") from None


def check_state(expected, state, source):
    """Raises Mistake if a tensor of `expected` is missing in `state` or has another shape; more may be there."""
    wrong = [k for k, v in expected.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise Mistake(
            f"{source} is no such checkpoint: {len(wrong)} of {len(expected)} tensors are missing or have another "
            f"shape, among them {wrong[0]}"
        )


def network(cls, config, state, source, dtype=torch.float32, **options):
    """One of transformers' networks with these weights, in `dtype`; no random weights are drawn first.

    Raises:
        Mistake: see `check_state`.
    """
    with torch.device("meta"):
        expected = cls(config, **options).state_dict()
    check_state(expected, state, source)
    state = {k: state[k] for k in expected}
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)


def check_clip_folder(name, path, repo):
    """Raises Mistake if `path` is not a folder in transformers' format."""
    if not (Path(path) / "config.json").is_file():
        raise Mistake(f"--reward_checkpoint {name}={path}: give the folder of a copy of {repo}, with config.json")


def clip_network(name, path, repo, cache_dir=None):
    """A `CLIPModel` from a folder in transformers' format, or from the Hub, in float32.

    Raises:
        Mistake: if it is not there, is incomplete, or `path` is a file.
    """
    if path is not None:
        check_clip_folder(name, path, repo)
        check_folder(ModelSource(str(path)))
    try:
        model, report = CLIPModel.from_pretrained(
            path or repo, cache_dir=cache_dir, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise missing(name, "the CLIPModel", repo, error) from None
    if report["missing_keys"]:
        raise Mistake(f"{path or repo} is incomplete: {len(report['missing_keys'])} tensors of the CLIPModel lack")
    return model


def load_tokenizer(cls, name, path, repo, cache_dir=None):
    """The tokenizer in the checkpoint's folder if there is one, otherwise that of `repo` on the Hub.

    Raises:
        Mistake: if neither is there.
    """
    folder = None if path is None else Path(path) if Path(path).is_dir() else Path(path).parent
    local = folder and any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json"))
    try:
        return cls.from_pretrained(folder if local else repo, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        reason = f"{str(error).splitlines()[0]} Its files may lie beside the checkpoint."
        raise missing(name, "the tokenizer", repo, reason) from None
