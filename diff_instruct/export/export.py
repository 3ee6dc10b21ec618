"""Writes what a run is for: the pipeline, its model card and the summary; and puts them on the Hub."""

import json
from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import create_repo, upload_folder
from peft import get_peft_model_state_dict

from diff_instruct.export.card import LORA_WEIGHTS, write_card
from diff_instruct.models.lora import merged


def save_lora(folder, stock_class, network):
    """`pytorch_lora_weights.safetensors`, as the stock pipeline's `load_lora_weights` takes it."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    metadata = network.peft_config["default"].to_dict()
    stock_class.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)


def export(args, pipe, summary, stock_class, prompt):
    """Save the pipeline, card and `training_summary.json` in `--output_dir`; push them if asked to.

    With `--lora_rank` the pipeline gets the merged network.

    Returns:
        The card of the pushed or written model.
    """
    folder = Path(args.output_dir)
    if args.lora_rank > 0:
        network, name = pipe.denoiser, "transformer" if pipe.unet is None else "unet"
        if name == "unet":  # PixArtAlphaPipeline has no `load_lora_weights`
            save_lora(folder, stock_class, network)
        pipe.register_modules(**{name: merged(network)})
    pipe.save_pretrained(folder)
    (folder / "training_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    card = write_card(args, pipe, summary, stock_class, prompt)
    if args.push_to_hub:
        repo = create_repo(args.hub_model_id or folder.resolve().name, exist_ok=True, token=args.hub_token).repo_id
        parts = [f"{name}/*" for name, value in pipe.components.items() if value is not None]
        files = [
            "model_index.json",
            LORA_WEIGHTS,
            "pipeline_one_step.py",
            "README.md",
            "*.png",
            "training_summary.json",
        ]
        upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=parts + files,
            commit_message="Diff-Instruct++ one-step generator",
            token=args.hub_token,
        )
    return card
