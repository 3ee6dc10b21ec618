"""What a run records of itself: its arguments, prompts, versions, code and device."""

import hashlib
import platform
import shlex
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import dataset_info
from huggingface_hub.errors import HTTPError

from diff_instruct.prompts.readers import format_of
from diff_instruct.prompts.samples import PICTURES, texts_of_tar


ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "huggingface_hub"]


def portable(word):
    """A word of the command line without the folders of this machine: of a local path the last part is kept.

    Also within NAME=PATH, and in path/to/file.py:function. Hub ids stay as they are.
    """
    head, equals, value = str(word).rpartition("=")
    file, is_file, rest = value.partition(".py:")
    path = Path(f"{file}.py" if is_file else value).expanduser()
    if path.is_absolute() or ("/" in value and path.exists()):
        value = path.name + (f":{rest}" if is_file else "")
    return head + equals + value


def arguments_of(args):
    """The arguments as they are recorded, plain values by name, a list as one would type it, without the folders of
    this machine."""
    recorded = {}
    for name, value in vars(args).items():
        if isinstance(value, list):
            value = shlex.join(portable(word) for word in value)
        elif not isinstance(value, (int, float)):
            value = portable(value)
        recorded[name] = value
    return recorded


def digest(path):
    """SHA-256, hexadecimal, of a file; of a folder: of the names and digests of its files but for pictures."""
    path = Path(path)
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file() and p.suffix.lower() not in PICTURES)
        names = sorted(p.relative_to(path).as_posix() for p in files)
        return hashlib.sha256("".join(f"{name} {digest(path / name)}\n" for name in names).encode()).hexdigest()
    stat = path.stat()
    return digest_of_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=None)
def digest_of_file(path, size, changed):
    """SHA-256, hexadecimal, of a file; of a web dataset: of its texts, as the pictures in it are large."""
    found = hashlib.sha256()
    if format_of(path) == ".tar":
        for sample in texts_of_tar(path).values():
            found.update(repr(sorted(sample.items())).encode())
        return found.hexdigest()
    with path.open("rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.hexdigest()


def prompts_of(args):
    """What identifies the prompts: SHA-256 of the files, by argument, or the commit of the dataset on the Hub (None if
    it cannot be asked for)."""
    files = {k: getattr(args, k) for k in ("train_prompts", "eval_prompts") if getattr(args, k) is not None}
    found = {k: f"sha256:{digest(path)}" for k, path in files.items()}
    if args.dataset_name is not None:
        if Path(args.dataset_name).is_dir():
            found["dataset_name"] = f"sha256:{digest(args.dataset_name)}"
        else:
            try:
                found["dataset_name"] = dataset_info(args.dataset_name, timeout=10).sha
            except (OSError, HTTPError):
                found["dataset_name"] = None
    return found


def git_commit():
    """The commit of the code, with `-dirty` if files differ from it; None if it has no repository of its own."""
    if not (ROOT / ".git").exists():
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def record_of(args, accelerator):
    """Arguments, seed, prompts, versions, code and device, for the summary."""
    device = accelerator.device
    return {
        "arguments": arguments_of(args),
        "seed": args.seed,
        "prompts": prompts_of(args),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
    }
