"""A transformer's file for other programs in bfloat16, in scaled float8, or as GGUF; one tensor after the other.

Rounded are the matrices of its blocks. What maps inputs into the blocks and outputs out of them is a small part of a
network and keeps float32 in a GGUF, bfloat16 elsewhere, as vectors do.
"""

import re
from pathlib import Path

import numpy as np
import torch

from diff_instruct.files import whole
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import read_index
from diff_instruct.models.tensors import write_tensors


FP8 = torch.float8_e4m3fn
GGUF_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # the package reads K-quants, but does not write them
SMALLEST = 1024  # numbers of a matrix that is worth rounding


def is_rounded(part, block=1):
    """Whether a [`Stacked`] weight is a matrix of a block, whose rows divide into blocks of so many numbers."""
    inside = all(re.search(r"\.\d+\..*weight$", key) for key in part.weights)
    return inside and len(part.shape) == 2 and part.shape[1] % block == 0 and part.shape.numel() > SMALLEST


def write_bfloat16(path, layout):
    """One safetensors file; `layout` as `original_layout` makes it."""
    like = {name: torch.empty(part.shape, dtype=torch.bfloat16, device="meta") for name, part in layout.items()}
    write_tensors(path, like, (part() for part in layout.values()))


def write_fp8(path, layout):
    """One safetensors file of e4m3 numbers, with a scale for each matrix beside it, as ComfyUI reads it: weight =
    `weight` · `scale_weight`; `scaled_fp8` says that it is such a file, and its two numbers that products are to be
    computed in full precision."""
    like, tensors = {"scaled_fp8": torch.empty(2, dtype=FP8, device="meta")}, [lambda: torch.zeros(2)]

    def scale(part):
        return part().float().abs().max().clamp(min=1e-12) / torch.finfo(FP8).max

    for name, part in layout.items():
        if is_rounded(part):
            like[name] = torch.empty(part.shape, dtype=FP8, device="meta")
            like[name.removesuffix("weight") + "scale_weight"] = torch.empty((), device="meta")
            tensors += [lambda part=part: part().float() / scale(part), lambda part=part: scale(part)]
        else:
            like[name] = torch.empty(part.shape, dtype=torch.bfloat16, device="meta")
            tensors.append(part)
    write_tensors(path, like, (make() for make in tensors))


def write_gguf(path, layout, architecture, kind, gently=()):
    """One GGUF file.

    Args:
        architecture: what `general.architecture` is in it: ComfyUI-GGUF tells by it what the file holds.
        kind: of `GGUF_TYPES`.
        gently: words in the diffusers names of matrices that keep 8 bits: modulations, which all tokens go through.
    """
    import gguf

    wanted, eight = gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    types = {}
    for name, part in layout.items():
        if is_rounded(part, block):
            types[name] = eight if any(word in key for key in part.weights for word in gently) else wanted
        else:
            types[name] = gguf.GGMLQuantizationType.F32
    with whole(path) as aside:
        writer = gguf.GGUFWriter(aside, architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        for name, part in layout.items():  # what the header says of each, first
            numbers, size = gguf.GGML_QUANT_SIZES[types[name]]
            size = part.shape.numel() // numbers * size
            writer.add_tensor_info(name, part.shape, np.dtype("float32"), size, raw_dtype=types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, part in layout.items():
            writer.write_tensor_data(gguf.quants.quantize(part().float().cpu().numpy(), types[name]))
        writer.close()


def read_gguf(file, path, dtype, cache_dir=None):
    """The network of a GGUF file of the export `path`, which computes in `dtype`.

    Raises:
        Mistake: if there is no such file, or diffusers reads none of the export's network.
    """
    import diffusers

    check_gguf()
    if not Path(file).is_file():
        raise Mistake(f"--gguf {file} is no file: export_for_apps.py --write gguf writes one")
    _, name = read_index(path, cache_dir=cache_dir).get("transformer", (None, None))
    if name is None:
        raise Mistake(f"--gguf {file}: {path} has no transformer, and of UNets there are no GGUF files here")
    cls = getattr(diffusers, name)
    config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    where = {"config": str(path), "subfolder": "transformer", "quantization_config": config, "cache_dir": cache_dir}
    try:
        return cls.from_single_file(str(file), torch_dtype=dtype, **where)
    except (AttributeError, ValueError, KeyError) as error:
        raise Mistake(
            f"--gguf {file}: diffusers reads it as no {cls.__name__} ({str(error).splitlines()[0]})"
        ) from None


def check_gguf():
    """Raises Mistake if the package `gguf` is not there."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise Mistake("GGUF files need the package gguf: pip install gguf") from None
