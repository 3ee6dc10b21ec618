"""Writes what a run is for: the pipeline, its model card and the summary; and puts them on the Hub."""

import json
import shlex
import time
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HFValidationError, HTTPError
from peft import get_peft_model_state_dict

from diff_instruct.export.card import EVAL_RESULTS, LORA_WEIGHTS, write_card
from diff_instruct.export.stock import rename_clip
from diff_instruct.mistake import Mistake
from diff_instruct.models.lora import merged
from diff_instruct.models.sharding import whole
from diff_instruct.models.tensors import save_network
from diff_instruct.models.weight_files import options
from diff_instruct.training.record import portable


WAITS = (2, 10, 60)  # seconds between attempts to upload


def save_lora(folder, family, network):
    """`pytorch_lora_weights.safetensors`, as the stock pipeline's `load_lora_weights` takes it.

    Without a folder, on the processes that only give their shares of it, nothing is written.
    """
    layers = get_peft_model_state_dict(network, adapter_name="generator")
    layers = {name: whole(tensor) for name, tensor in layers.items()}
    if folder is None:
        return
    if family.denoiser == "unet":  # transformers' are loaded under peft's names
        layers = convert_state_dict_to_diffusers(layers)
    metadata = network.peft_config["generator"].to_dict()
    names = f"{family.denoiser}_lora_layers", f"{family.denoiser}_lora_adapter_metadata"
    family.stock().save_lora_weights(folder, **dict(zip(names, (layers, metadata))))


def save_generator(args, models, pipe, folder=None):
    """Write the generator in its part of the folder, LoRA merged into its base; and its LoRA by itself.

    All processes call it, without a folder those that write nothing: a sharded generator is gathered from all of them,
    tensor by tensor, as the file is written.
    """
    if args.lora_rank > 0 and models.family.has_lora_files() and models.lora is None:
        save_lora(folder, models.family, pipe.denoiser)  # with one to start from, the base is in no stock pipeline
    save_network(pipe.denoiser, folder and folder / models.denoiser, merged(pipe.denoiser, "generator"))


def save_part(models, pipe, name, folder):
    """Write another component of the pipeline, as its `save_pretrained` would: VAE and text encoders as they were
    published, where the run holds them rounded to another dtype."""
    part = getattr(pipe, name)
    if name in models.networks and part.dtype != torch.float32:
        own_vae = name == "vae" and models.vae is not None
        source, where, first = (models.vae, "", "plain") if own_vae else (models.reference, name, "named")
        part = type(part).from_pretrained(source.path, subfolder=where, **options(source, where, first))
    part.save_pretrained(folder)
    rename_clip({"": part}, folder)


def export(args, models, pipe, summary, prompts, pictures, license, folder):
    """Save the pipeline, as `pipe.save_pretrained` lays it out, card and `training_summary.json`.

    With `--lora_rank` what is written is the merged network; the pipeline itself stays as it is. While the main
    process calls this, the others call `save_generator`.

    Args:
        prompts, pictures (`torch.Tensor`, (B, 3, H, W) in [0, 1]): what the generator drew, for the card.
        license (`dict`): from `base_license`.
        folder: an empty one, in which nothing lies that the pipeline still reads; see `whole_folder`.

    Returns:
        The card.
    """
    save_generator(args, models, pipe, folder)
    for name, part in pipe.components.items():
        if part is not None and name != models.denoiser:
            save_part(models, pipe, name, folder / name)
    pipe.save_config(folder)
    forget_folders([folder / "model_index.json", *folder.glob("*/config.json")])
    (folder / "training_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "images").mkdir(exist_ok=True)
    for i, image in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures.clamp(0, 1)))):
        image.save(folder / "images" / f"{i}.png")
    return write_card(args, pipe, summary, models.family, prompts, license or {}, folder)


def forget_folders(files):
    """Leave the last part of the path in `_name_or_path` of configs, which says what a part was loaded from."""
    for file in files:
        config = json.loads(file.read_text())
        if "_name_or_path" in config:
            config["_name_or_path"] = portable(config["_name_or_path"])
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def create_repository(args):
    """The repository of `--push_to_hub`, made before the run, so that a mistake shows then.

    Raises:
        Mistake: if it cannot be made.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, private=args.hub_private_repo).repo_id
    except (OSError, HTTPError, HFValidationError) as error:
        raise Mistake(f"--push_to_hub: {name} cannot be created on the Hub: {str(error).splitlines()[0]}") from None


def upload(args, repo, pipe):
    """Upload pipeline, card, pictures and summary, and nothing else; several attempts, as far as errors may pass.

    If it fails, say which command does it later: the export is whole.
    """
    parts = [f"{name}/*" for name, value in pipe.components.items() if value is not None]
    files = ["model_index.json", LORA_WEIGHTS, "pipeline_one_step.py", "README.md", "*.png", "training_summary.json"]
    files += ["images/*.png", EVAL_RESULTS]
    for wait in (*WAITS, None):
        try:
            upload_folder(
                repo_id=repo,
                folder_path=args.output_dir,
                allow_patterns=parts + files,
                commit_message="Diff-Instruct++ one-step generator",
            )
            return
        except (OSError, HTTPError) as error:
            why, response = str(error).split("\n")[0], getattr(error, "response", None)
            if wait is None or (response is not None and response.status_code < 500):
                break
            print(f"The upload failed ({why}); next attempt in {wait} s.", flush=True)
            time.sleep(wait)
    include = shlex.join(word for pattern in parts + files for word in ("--include", pattern))
    print(f"The upload failed ({why}). The export is whole; upload it with")
    print(f"    hf upload {repo} {shlex.quote(args.output_dir)} . {include}")
