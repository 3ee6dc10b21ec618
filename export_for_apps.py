#!/usr/bin/env python
"""Write an exported generator for the programs that people draw with: ComfyUI, Forge, stable-diffusion.cpp, OpenVINO.

`python export_for_apps.py EXPORT DIR` writes what the family has a layout for, in float16, flow matching in bfloat16:
one file in the original layout, the network alone, the LoRA at its strength, a ComfyUI workflow, the stock diffusers
pipeline, and a page with the noise levels and command lines of each program. `--write fp8 gguf` writes the network
rounded.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import save_file

from diff_instruct.command_line import Parser
from diff_instruct.evaluation.candidates import check_one_step, is_one_step
from diff_instruct.export.apps import find_app, own_layout, where_it_runs, workflow
from diff_instruct.export.card import LORA_WEIGHTS
from diff_instruct.export.kohya import folded_lora, kohya_lora, original_lora
from diff_instruct.export.layouts import single_file, unet_layout, vae_layout
from diff_instruct.export.original import original_layout
from diff_instruct.export.rounded import GGUF_TYPES, check_gguf, write_bfloat16, write_fp8, write_gguf
from diff_instruct.export.stock import save_stock
from diff_instruct.families import find_family
from diff_instruct.files import NotWritten, check_apart, whole, whole_folder, write_text
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import read_index


KINDS = ("single_file", "network", "lora", "workflow", "diffusers", "fp8", "gguf")
ASKED_FOR = ("fp8", "gguf")  # the others are written if nobody says


def build_parser():
    """All arguments."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("export", help="folder or Hub id of what the training script exports")
    add("folder", help="where the files are written")
    add("--write", nargs="+", choices=KINDS, help="default: all that the family has a layout for, but the "
        "network rounded")  # fmt: skip
    add("--gguf", nargs="+", choices=GGUF_TYPES, default=["q8_0"], help="how GGUF files are rounded, one file each")
    add("--name", help="what the files are called; default: the name of the export")
    add("--prompt", default="a red apple", help="in the workflow and the command lines")
    add("--trust_remote_code", action="store_true", help="run the pipeline_one_step.py of an export on the Hub")
    add("--cache_dir", help="where downloads are kept")
    return parser


def load_export(path, trust_remote_code=False, cache_dir=None):
    """The `OneStepPipeline` of a folder or Hub id, in float16; flow matching in bfloat16, as it is published.

    Raises:
        Mistake: if it is none, is not whole, or would run code of the Hub without leave.
    """
    index = read_index(path, cache_dir=cache_dir)
    if not is_one_step(index):
        raise Mistake(f"{path} is a {index['_class_name']}, not an export: give what the training script writes")
    if not (Path(path).is_dir() or trust_remote_code):
        raise Mistake(f"{path} brings its own pipeline_one_step.py: look at it, then add --trust_remote_code")
    check_one_step(path, index, None, cache_dir)
    flow = find_family(index["family"], path).flow
    dtype = torch.bfloat16 if flow else torch.float16
    return DiffusionPipeline.from_pretrained(path, trust_remote_code=True, cache_dir=cache_dir, dtype=dtype)


def can_write(pipe, path):
    """The kinds of files that an export can be written to, in order.

    Raises:
        Mistake: if there are none.
    """
    app = find_app(pipe)
    lacks = set() if app.single_file else {"single_file"}
    if app.original is None:
        lacks.add("fp8")
    if app.architecture is None:
        lacks.add("gguf")
    if not (Path(path) / LORA_WEIGHTS).is_file():
        lacks.add("lora")
    return [kind for kind in KINDS if kind not in lacks]


def write(pipe, path, folder, name, kinds, prompt, gguf_types=()):
    """Write each of the kinds; returns the paths, relative to the folder."""
    written, app = [], find_app(pipe)
    folder.mkdir(parents=True, exist_ok=True)

    def weights(suffix, state):
        state = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
        with whole(folder / f"{name}{suffix}.safetensors") as aside:
            save_file(state, aside, metadata={"format": "pt"})
        written.append(f"{name}{suffix}.safetensors")

    def layout(write, suffix, *how):
        write(folder / f"{name}_transformer{suffix}", original_layout(pipe.transformer, app.original), *how)
        written.append(f"{name}_transformer{suffix}")

    if "single_file" in kinds:
        weights("", single_file(pipe))
    if "network" in kinds and pipe.unet is not None:
        weights("_unet", unet_layout(pipe.unet))
    elif "network" in kinds and app.original is None:  # no original layout in diffusers: its own, which ComfyUI reads
        weights("_transformer", own_layout(pipe.transformer, app))
    elif "network" in kinds:
        layout(write_bfloat16, ".safetensors")
    if "network" in kinds and pipe.unet is None and app.vae is None:
        weights("_vae", {k.partition(".")[2]: v for k, v in vae_layout(pipe.vae).items()})
    if "network" in kinds and app.encoder and any(file.startswith("{name}") for file in app.encoder[2:]):
        weights("_text_encoder", pipe.text_encoder.state_dict())
    if "fp8" in kinds:
        layout(write_fp8, "_fp8.safetensors")
    for kind in gguf_types if "gguf" in kinds else ():
        layout(write_gguf, f"_{kind}.gguf", app.architecture, kind, pipe.family.modulation)
    if "lora" in kinds and pipe.unet is not None:
        weights("_lora", kohya_lora(Path(path) / LORA_WEIGHTS))
    elif "lora" in kinds and app.original_lora:
        weights("_lora", original_lora(Path(path) / LORA_WEIGHTS, pipe.transformer, app.original))
    elif "lora" in kinds:
        weights("_lora", folded_lora(Path(path) / LORA_WEIGHTS))
    if "workflow" in kinds:
        write_text(folder / f"{name}_workflow.json", json.dumps(workflow(pipe, name, prompt), indent=2) + "\n")
        written.append(f"{name}_workflow.json")
    if "diffusers" in kinds:
        with whole_folder(folder / f"{name}_diffusers") as aside:
            save_stock(pipe, aside)
        written.append(f"{name}_diffusers")
    notes = ""
    if app.half_overflows and pipe.vae.config.force_upcast and "single_file" in kinds:
        notes = (
            f"\n\nThe VAE in {name}.safetensors is in float16, in which this one may overflow: the picture is then "
            "black. ComfyUI decodes in bfloat16 or float32 by itself; in Forge and A1111 give `--no-half-vae`; "
            "for stable-diffusion.cpp, `--vae` with a VAE made for float16, such as madebyollin/sdxl-vae-fp16-fix."
        )
    page = f"# Where {name} runs\n\nWritten: {', '.join(written)}.\n\n{where_it_runs(pipe, name, prompt)}{notes}\n"
    write_text(folder / f"{name}_apps.md", page)
    return [*written, f"{name}_apps.md"]


def main(args):
    kept = [("--cache_dir", args.cache_dir or HF_HUB_CACHE)]
    check_apart([("the folder", args.folder)], [("the export", args.export)], kept)
    if "gguf" in (args.write or ()):
        check_gguf()
    pipe = load_export(args.export, args.trust_remote_code, args.cache_dir)
    possible = can_write(pipe, args.export)
    for kind in args.write or ():
        if kind not in possible:
            raise Mistake(
                f"--write {kind}: {args.export} is a {pipe.config.family}"
                f"{' without LoRA' if kind == 'lora' else ''}, which can be written to {', '.join(possible)}"
            )
    name = f"{args.name or Path(args.export).resolve().name}_{len(pipe.timesteps)}step"
    kinds = args.write or [kind for kind in possible if kind not in ASKED_FOR]
    written = write(pipe, args.export, Path(args.folder), name, kinds, args.prompt, args.gguf)
    print((Path(args.folder) / written[-1]).read_text())


if __name__ == "__main__":
    try:
        args = build_parser().parse_args()
        main(args)
    except Mistake as error:
        sys.exit(f"error: {error}")
    except NotWritten as error:
        sys.exit(f"error: a file in {args.folder} could not be written: {error}")
