"""The model card: what was measured, how to use it, what it is made of."""

import json
import shlex
import sys
from datetime import date
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml, model_info
from huggingface_hub.errors import HTTPError

from diff_instruct.evaluation.statistics import INTERVALS, interval
from diff_instruct.export.apps import where_it_runs
from diff_instruct.prompts.survey import in_words
from diff_instruct.training.methods import METHODS, method_of
from diff_instruct.training.record import portable
from diff_instruct.training.standards import words_of_standards


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LINE = 119  # characters, of code
EVAL_RESULTS = ".eval_results/heldout_prompts.yaml"
TEMPLATE = Path(__file__).resolve().parents[2] / "model_card_template.md"


def stock_call(pipe, prompt):
    """The lines with which an exported generator runs in the stock pipeline of its family, at its first size."""
    own = pipe.family.stock_arguments(pipe) | dict(zip(("height", "width"), (pipe.config.sizes or [()])[0]))
    arguments = [f"prompt={json.dumps(prompt)}", *(f"{k}={v!r}" for k, v in own.items())]
    call = f"{pipe.family.stock_setup()}image = stock({', '.join(arguments)}).images[0]"
    if len(call.splitlines()[-1]) > LINE:
        call = call.replace("image = stock(", "image = stock(\n    ").replace(").images[0]", "\n).images[0]")
    if pipe.family.flow and len(pipe.timesteps) > 1:  # most of these pipelines do not hand `generator=` to each step
        seed = "torch.manual_seed(0)  # the noise between steps, too, which `generator=` does not seed everywhere\n"
        call = "import torch\n" + call.replace("image = stock(", f"{seed}image = stock(")
    sigma, shape = pipe.schedule.sigmas[pipe.timesteps[0]].item(), ", ".join(map(str, pipe.latent_shape()))
    if pipe.config.input_noise == "unit" or sigma == 1:
        return call
    noise = f"import torch\nlatents = {sigma:.6f} * torch.randn(1, {shape})  # σ_t z\n"
    return noise + call.replace("num_inference_steps", "latents=latents, num_inference_steps")


def base_license(base):
    """`license`, and where it is no standard one `license_name` and `license_link`, as the base model's card has them.

    Empty if it names none or cannot be read.
    """
    card, data = Path(base) / "README.md", None
    if card.is_file():
        data = ModelCard.load(card).data
    elif not Path(base).exists():
        try:
            data = model_info(base).card_data
        except (OSError, HTTPError) as error:
            print(f"The licence of {base} could not be asked for ({str(error).splitlines()[0]}): set it in the card.")
    names = ("license", "license_name", "license_link")
    return {} if data is None else {name: data.get(name) for name in names if data.get(name) is not None}


def figures_table(summary):
    """Markdown: before, after and gain of each figure, with their intervals."""

    def cell(name):
        return f"{summary[name]:.3f}{interval(summary[f'{name}_ci95'])}"

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
        return f"{name or shlex.split(summary['arguments']['heldout_reward'])[0]} (not trained)"
    if not summary["reward_scale"]:
        return f"{name or summary['arguments']['reward']} (not trained: reward scale 0)"
    return f"{name} (part of the reward)" if name else f"{summary['arguments']['reward']} (trained)"


def rounded_words(args, summary):
    """How what was judged, on a rounded base, differs from what is shipped; empty where it is the same."""
    difference = summary.get("rounded_base")
    if difference is None:
        return ""
    figures = {k: v for k, v in difference.items() if isinstance(v, dict)}
    words = [f"{label(k, summary)} {v['judged']:.3f} and {v['shipped']:.3f}" for k, v in figures.items()]
    base = "" if args.base_quantization == "none" else f" in {args.base_quantization}"
    return (
        f"Trained and judged was a LoRA on a base{base}; what is shipped is the same LoRA merged into the published "
        f"weights. On the first {difference['n_prompts']} of these prompts, judged and shipped: {', '.join(words)}; "
        f"pictures differ by {difference['pixels']:.4f} of the range of a pixel."
    )


def card_data(args, pipe, prompts, license, lora):
    """What the Hub reads of a card.

    Args:
        prompts: those of the pictures `images/0.png`, `images/1.png`, ...
        license (`dict`): from `base_license`.
        lora: whether there is a LoRA file.
    """
    base = args.pretrained_model_name_or_path
    on_hub = not Path(base).exists()
    tags = ["text-to-image", "diffusers", "diff-instruct", "few-step" if len(pipe.timesteps) > 1 else "one-step"]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if lora else "finetune") if on_hub else None,
        datasets=[args.dataset_name] if args.dataset_name else None,
        tags=tags + (["lora", "template:diffusion-lora"] if lora else []),
        widget=[{"text": prompt, "output": {"url": f"images/{i}.png"}} for i, prompt in enumerate(prompts)],
        **license,
    )


def eval_results(args, summary, today):
    """Entries of `.eval_results/*.yaml`, or none: they belong to a dataset on the Hub, and its prompts were held out.

    Args:
        today: the date, as the Hub writes it, 2026-01-31.
    """
    if args.dataset_name is None or args.eval_prompts is not None:
        return []
    about = f"{summary['n_images']} images of {summary['n_prompts']} prompts of the dataset that were not trained on"
    entries = []
    for figure in figure_names(summary):
        notes = f"{label(figure, summary)}; 95%{interval(summary[f'{figure}_after_ci95'], 4)}, before training "
        notes += f"{summary[f'{figure}_before']:.4f}; {about}"
        value = round(summary[f"{figure}_after"], 6)
        entries.append(EvalResultEntry(args.dataset_name, figure, value, date=today, notes=notes))
    return entries


def write_card(args, pipe, summary, family, prompts, license, folder):
    """Fill `model_card_template.md` with what was measured, and write `.eval_results`; returns the card.

    Args:
        prompts: those of the pictures in `images/`.
        license (`dict`): from `base_license`.
        folder: where the export is written.
    """
    base, on_hub = args.pretrained_model_name_or_path, not Path(args.pretrained_model_name_or_path).exists()
    prompt, name = prompts[0], Path(args.output_dir).resolve().name
    lora = (folder / LORA_WEIGHTS).is_file()
    entries = eval_results(args, summary, date.today().isoformat())
    if entries:
        (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (folder / EVAL_RESULTS).write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    card = ModelCard.from_template(
        card_data(args, pipe, prompts, license, lora),
        template_path=str(TEMPLATE),
        name=name,
        repo=args.hub_model_id or Path(args.output_dir).name,
        base=base if on_hub else f"the local pipeline `{Path(base).name}`",
        method=method_of(args).name,
        citations="\n\n".join(method.bibtex for method in dict.fromkeys([METHODS["di++"], method_of(args)])),
        timesteps=pipe.timesteps,
        sizes=", ".join(f"{width}×{height}" for height, width in pipe.config.sizes or ()),
        stock_call=stock_call(pipe, prompt),
        stock_class=family.name,
        lora=lora,
        merged=args.lora_rank > 0 and not lora,
        denoiser=family.denoiser,
        base_words=json.dumps(base if on_hub else Path(base).name),
        where_it_runs=where_it_runs(pipe, f"{name}_{len(pipe.timesteps)}step", prompt),
        start=portable(args.pretrained_generator_name_or_path or base),
        prompt=json.dumps(prompt),
        pretrain_steps=args.pretrain_steps,
        align_steps=args.max_train_steps,
        reward=summary["arguments"]["reward"],
        reward_scale=summary["reward_scale"],
        cfg_scale=args.cfg_scale,
        standards=words_of_standards(summary.get("reward_standards", {})),
        table=figures_table(summary),
        rounded=rounded_words(args, summary),
        intervals=INTERVALS,
        prompts_read=in_words(summary["prompt_rows"]),
        license=license.get("license_name") or license.get("license"),
        command=command_line(),
        arguments=json.dumps(summary["arguments"], indent=2),
        heldout=shlex.join(portable(name) for name in args.heldout_reward or []),
        **{k: summary[k] for k in ("n_images", "n_prompts", "steps", "seconds", "diversity_by")},
    )
    card.save(folder / "README.md")
    return card


def command_line():
    """The command of this run, without the folders of this machine; `parse_args` has taken the token out of it."""
    return shlex.join(["accelerate", "launch", "train_diff_instruct_pp.py", *map(portable, sys.argv[1:])])
