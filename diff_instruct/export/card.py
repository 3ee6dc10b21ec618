"""The model card: what was measured, how to use it, what it is made of."""

import json
import math
import shlex
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, model_info
from huggingface_hub.errors import HfHubHTTPError

from diff_instruct.training.methods import METHODS, method_of


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
TEMPLATE = Path(__file__).resolve().parents[2] / "model_card_template.md"


def stock_call(family, pipe, prompt):
    """The lines with which an exported generator runs in the stock pipeline of its family."""
    words = {"prompt": json.dumps(prompt), "steps": len(pipe.timesteps), "timesteps": pipe.timesteps}
    sigmas = [t / pipe.schedule.steps for t in pipe.timesteps]
    words |= {
        "sigmas": sigmas,
        "angles": [*(math.atan2(s, 1 - s) for s in sigmas), 0.0],
    }  # σ = sin a / (sin a + cos a)
    words["guidance"] = pipe.config.embedded_guidance or 0.0
    return family.stock_call.format(**words)


def base_license(base):
    """The licence that the base model's card names, or None if it names none or cannot be read."""
    card = Path(base) / "README.md"
    if card.is_file():
        return ModelCard.load(card).data.get("license")
    if Path(base).is_dir():
        return None
    try:
        card_data = model_info(base).card_data
    except (OSError, HfHubHTTPError) as error:
        print(f"The licence of {base} could not be asked for ({str(error).splitlines()[0]}): set it in the card.")
        return None
    return None if card_data is None else card_data.get("license")


def figures_table(summary):
    """Markdown: before, after and gain of each figure, with their intervals."""

    def cell(name):
        low, high = summary[f"{name}_ci95"]
        return f"{summary[name]:.3f} [{low:.3f}, {high:.3f}]"

    rows = ["| | before | after | gain |", "|---|---|---|---|"]
    for key in figure_names(summary):
        cells = " | ".join(cell(f"{key}_{column}") for column in ("before", "after", "gain"))
        rows.append(f"| {label(key, summary)} | {cells} |")
    return "\n".join(rows)


def figure_names(summary):
    """What was measured before and after: `reward`, `heldout`, `diversity`, ..."""
    return [key.removesuffix("_before") for key in summary if key.endswith("_before")]


def label(figure, summary):
    """A figure in words."""
    kind, _, name = figure.partition("_")
    if kind == "diversity":
        return "diversity"
    if kind == "heldout":
        return f"{name or summary['arguments']['heldout_reward'].split()[0]} (not trained)"
    if not summary["reward_scale"]:
        return f"{name or summary['arguments']['reward']} (not trained: reward scale 0)"
    return f"{name} (part of the reward)" if name else f"{summary['arguments']['reward']} (trained)"


def write_card(args, pipe, summary, family, prompt, license):
    """Fill `model_card_template.md` with what was measured; returns the card."""
    base, on_hub = args.pretrained_model_name_or_path, not Path(args.pretrained_model_name_or_path).is_dir()
    stock_class = family.stock
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        base_model=base if on_hub else None,
        tags=["text-to-image", "diffusers", "diff-instruct", "few-step" if len(pipe.timesteps) > 1 else "one-step"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=Path(args.output_dir).resolve().name,
        repo=args.hub_model_id or Path(args.output_dir).name,
        base=base if on_hub else f"the local pipeline `{Path(base).name}`",
        method=method_of(args).name,
        citations="\n\n".join(method.bibtex for method in dict.fromkeys([METHODS["di++"], method_of(args)])),
        timesteps=pipe.timesteps,
        stock_call=stock_call(family, pipe, prompt),
        stock_class=stock_class.__name__,
        lora=(Path(args.output_dir) / LORA_WEIGHTS).is_file(),
        start=args.pretrained_generator_name_or_path or base,
        prompt=json.dumps(prompt),
        pretrain_steps=args.pretrain_steps,
        align_steps=args.max_train_steps,
        reward=summary["arguments"]["reward"],
        reward_scale=summary["reward_scale"],
        cfg_scale=args.cfg_scale,
        table=figures_table(summary),
        license=license,
        command=command_line(),
        arguments=json.dumps(summary["arguments"], indent=2),
        heldout=shlex.join(args.heldout_reward or []),
        **{k: summary[k] for k in ("n_images", "n_prompts", "steps", "seconds", "diversity_by")},
    )
    card.save(Path(args.output_dir) / "README.md")
    return card


def command_line():
    """The command of this run, without the token."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        if not (hidden or word.startswith("--hub_token")):
            words.append(word)
        hidden = word == "--hub_token"
    return shlex.join(["accelerate", "launch", "train_diff_instruct_pp.py", *words])
