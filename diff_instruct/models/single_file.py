"""A reference in one .safetensors file, as other programs have it: converted once to a diffusers folder, by diffusers.

Everything else then works as with any folder: the generator's float32 copy, quantised bases, resumed runs, exports.
"""

import hashlib
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open

from diff_instruct.families import find_family
from diff_instruct.files import NotWritten, writing
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import read_index
from diff_instruct.models.starts import weight_shapes


FLAG = "--pretrained_model_name_or_path"
SCALES = ("scaled_fp8", "scale_weight", "weight_scale", ".absmax")  # ends of names beside float8 and 4-bit weights
OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def is_single_file(path):
    """Whether a reference is one file instead of a folder or a Hub id."""
    return Path(path).is_file() or path.endswith((".safetensors", ".ckpt"))


def config_of(file, config=None):
    """The pipeline, a folder or Hub id, whose configs fit a file: the given one, or the one that diffusers knows its
    kind by.

    Raises:
        Mistake: for a file that is not there, is no .safetensors file or holds something else.
    """
    if not Path(file).is_file():
        raise Mistake(f"{FLAG}: there is no file {file}")
    if not file.endswith(".safetensors"):
        raise Mistake(f"{FLAG} {file}: of single files only .safetensors are read; save it so with safetensors")
    shapes = weight_shapes(file)
    if any(".lora_" in key for key in shapes):
        raise Mistake(f"{FLAG} {file} holds LoRA weights: give their base there, and the file as --reference_lora")
    rounded = next((key for key in shapes if key.endswith(SCALES)), None)
    if rounded is not None:  # diffusers would leave the scales out, without a word
        raise Mistake(f"{FLAG} {file} is rounded ({rounded} is a scale): give the file in bfloat16 or float16")
    if config is not None:
        return config
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return fetch_diffusers_config(empty)["pretrained_model_name_or_path"]


def converted(file, config, cache_dir=None):
    """The diffusers folder of a file, made by the first process that asks and kept for later runs.

    Args:
        config: folder or Hub id of a pipeline of the same architecture. What the file does not hold, such as the text
            encoders of one that is a network alone, is taken from there.
        cache_dir: where it is kept; by default in the Hub's own folder.

    Raises:
        Mistake: if diffusers cannot read it.
    """
    stat, index = Path(file).stat(), read_index(config, cache_dir=cache_dir)
    what = f"{Path(file).resolve()} {stat.st_size} {stat.st_mtime_ns} {config}"
    name = f"{Path(file).stem}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    folder = Path(cache_dir or HF_HOME) / "converted_single_files" / name
    try:
        with writing():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    print(f"{file} is converted to diffusers' layout, once, in {folder}.", flush=True)
                    aside = folder.with_name(f".{folder.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    read(file, config, index, cache_dir).save_pretrained(aside)
                    aside.rename(folder)
    except NotWritten as error:
        raise Mistake(
            f"{FLAG} {file} cannot be converted to diffusers' layout in {folder.parent}: {error}; name another "
            "--cache_dir"
        ) from None
    return str(folder)


def read(file, config, index, cache_dir):
    """The stock pipeline of a file, in the file's own dtype."""
    family = find_family(index["_class_name"], config)
    with_parts = any(key.startswith(OTHER_PARTS) for key in weight_shapes(file))
    options = {"dtype": dtype_of(file), "cache_dir": cache_dir}
    unused = {name: None for name in family.unused if name in index}
    try:
        if with_parts and hasattr(family.stock(), "from_single_file"):
            return family.stock().from_single_file(file, config=config, **options, **unused)
        component = getattr(diffusers, index[family.denoiser][1])
        network = component.from_single_file(file, config=config, subfolder=family.denoiser, **options)
        return family.stock().from_pretrained(config, **{family.denoiser: network}, **options, **unused)
    except (SingleFileComponentError, ValueError, LookupError, OSError, RuntimeError, AttributeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Mistake(
            f"{FLAG} {file} is not read by diffusers as a {family.name} with the configs of {config} ({why}): convert "
            "it with the script of its family in diffusers' folder scripts/, and give the folder; or name another "
            "--single_file_config"
        ) from None


def dtype_of(file):
    """The dtype of a file's first weight that is a floating point number."""
    with safe_open(file, framework="pt") as f:
        dtypes = (f.get_slice(key).get_dtype() for key in f.keys())
        return next({"F16": torch.float16, "BF16": torch.bfloat16}.get(d, torch.float32) for d in dtypes if "F" in d)
