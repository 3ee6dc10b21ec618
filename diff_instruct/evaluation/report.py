"""From the scores of several models on the same prompts to figures, their comparison, and the tables of both."""

import sys
from collections import Counter
from importlib.metadata import version
from statistics import median

import torch

from diff_instruct.evaluation.cost import MEMORY_IS
from diff_instruct.evaluation.prompt_sets import RULES
from diff_instruct.evaluation.statistics import INTERVALS, interval, mean_over_categories, mean_with_interval, wins
from diff_instruct.rewards.catalogue import CATALOGUE


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "pillow")


def unit_of(name):
    """Of a reward's score, where it is published in others, too; else None."""
    return CATALOGUE[name].unit if name in CATALOGUE else None


def figure(values, prompts):
    """{"mean", "ci95"} of values (P, n) or (P,), as the prompt set's rule says."""
    if prompts.rule == "categories":
        mean, interval = mean_over_categories(values, prompts.categories)
    else:
        mean, interval = mean_with_interval(values)
    return {"mean": mean, "ci95": interval}


def by_category(values, categories):
    """`figure` of the prompts of each category alone, and how many they are; some may have none."""
    figures = {}
    for name in sorted(set(categories) - {None}):
        chosen = torch.tensor([category == name for category in categories])
        mean, interval = mean_with_interval(values[chosen])
        figures[name] = {"mean": mean, "ci95": interval, "n_prompts": int(chosen.sum())}
    return figures


def summarise(scores, prompts):
    """The figures of one model.

    Args:
        scores (`dict`): tensors (P, n) for each reward, (P,) for `diversity`.
        prompts ([`PromptSet`]): the P prompts.
    """
    figures = {key: figure(values, prompts) for key, values in scores.items()}
    if prompts.categories:
        for key, values in scores.items():
            figures[key]["by_category"] = by_category(values, prompts.categories)
    return figures


def compare_pairs(scores, baseline, prompts):
    """A model against the baseline, image by image: the same prompts and seeds.

    Returns:
        `dict`: for each figure its `difference` from the baseline, and for rewards the `win_rate`, the share of pairs
        in which the model's image scores higher, ties counting half; each a `figure`.
    """
    result = {}
    for key, values in scores.items():
        result[key] = {"difference": figure(values - baseline[key], prompts)}
        if key != "diversity":
            result[key]["win_rate"] = figure(wins(values, baseline[key]), prompts)
    return result


def report(args, contenders, kept, prompts, device, cuts=()):
    """All that was measured, as `evaluation.json` has it.

    Args:
        contenders (`dict`): [`Contender`] by name.
        kept (`dict`): the finished batches of each, in order.
        prompts ([`PromptSet`]): what they were asked for.
        cuts (`dict`): [`Cut`] by name: the prompts that each reads in part only.
    """
    scores = {
        name: {key: torch.tensor([row for b in part for row in b["scores"][key]]) for key in part[0]["scores"]}
        for name, part in kept.items()
    }
    models = {
        name: {
            **contenders[name].describe(),
            "latent_shape": part[0]["latent_shape"],
            "figures": summarise(scores[name], prompts),
            "cut_prompts": cuts[name].as_dict() if name in cuts else None,
            "seconds_per_image": median(b["seconds_per_image"] for b in part),
            "peak_memory_gib": max(b["gib"] for b in part),
        }
        for name, part in kept.items()
    }
    baseline = args.baseline or next(iter(models))
    others = [name for name in models if name != baseline]
    cut = {key: set() for key in next(iter(kept.values()))[0]["truncated"]}
    for b in (b for part in kept.values() for b in part):
        for key, checksums in b["truncated"].items():
            cut[key].update(checksums)
    categories = prompts.categories and Counter(prompts.categories)
    holes = categories.pop(None, 0) if categories else len(prompts.texts)
    return {
        "prompts": {
            "source": prompts.source,
            "number": len(prompts.texts),
            "sha256": prompts.sha256,
            "categories": categories and {name: categories[name] for name in sorted(categories)},
            "without_category": holes,
            "rows": prompts.rows,
            "rule": prompts.rule,
            "rule_is": RULES[prompts.rule],
        },
        "num_images": args.num_images,
        "seed": args.seed,
        "image_seeds": "seed + 1000003 * (place of the prompt, from 0) + (number of the image, from 0)",
        "units": {key: unit for key in next(iter(scores.values())) if (unit := unit_of(key))},
        "intervals": f"{INTERVALS}; within categories, if means are; 2000 resamples",
        "models": models,
        "comparison": {
            "baseline": baseline,
            "models": {name: compare_pairs(scores[name], scores[baseline], prompts) for name in others},
            "other_noise": [n for n in others if models[n]["latent_shape"] != models[baseline]["latent_shape"]],
        },
        "diversity_by": kept[baseline][0]["diversity_by"],
        "truncated_prompts": {key: len(checksums) for key, checksums in cut.items() if checksums},
        "seconds_are": f"median over batches of {args.batch_size} images at most, text encoder and VAE with it",
        "peak_memory_is": MEMORY_IS[device.type],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "arguments": {key: value for key, value in vars(args).items() if value is not None},
    }


def cell(entry, digits=3):
    """A figure and its interval, as tables show them."""
    return f"{entry['mean']:.{digits}f}{interval(entry['ci95'], digits)}"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(result):
    """The tables of `evaluation.json`, and how its figures were made."""
    models, prompts, comparison = result["models"], result["prompts"], result["comparison"]
    keys = list(next(iter(models.values()))["figures"])
    head = ["", *keys, "s / image", "GiB"]
    rows = [
        [name, *(cell(m["figures"][k]) for k in keys), f"{m['seconds_per_image']:.3f}", f"{m['peak_memory_gib']:.2f}"]
        for name, m in models.items()
    ]
    text = [
        f"# {len(models)} models on {prompts['number']} prompts of {prompts['source']}",
        table(head, rows),
        f"Each figure is the {RULES[prompts['rule']]}, of {result['num_images']} images a prompt (seed "
        f"{result['seed']}), with its interval ({result['intervals']}). SHA-256 of the prompts: "
        f"`{prompts['sha256']}`. s / image: {result['seconds_are']}. GiB: {result['peak_memory_is']}.",
    ]
    if result["units"]:
        text.append(f"Units: {'; '.join(f'{name}: {unit}' for name, unit in result['units'].items())}.")
    if "diversity" in keys:
        text.append(
            f"diversity: mean of 1 − cosine between the images of one prompt, by the image features of "
            f"`{result['diversity_by']}`."
        )
    if result["truncated_prompts"]:
        cut = ", ".join(f"{name} {n}" for name, n in result["truncated_prompts"].items())
        text.append(f"Prompts that a scorer could read in part only: {cut}.")
    cut = {name: m["cut_prompts"] for name, m in models.items() if m["cut_prompts"] and m["cut_prompts"]["cut"]}
    if cut:
        told = ", ".join(f"{name} {c['cut']} (more than {c['tokens']} tokens)" for name, c in cut.items())
        text.append(f"Prompts that a model's text encoder could read in part only: {told}.")
    if comparison["models"]:
        rows = []
        for name, figures in comparison["models"].items():
            for key, entry in figures.items():
                share = cell(entry["win_rate"]) if "win_rate" in entry else ""
                rows.append([name, key, cell(entry["difference"]), share])
        text += [
            f"## Against {comparison['baseline']}, pair by pair",
            table(["", "", "difference", "win rate"], rows),
            "Pairs have prompt and seed in common. A win is an image that scores higher than its pair; ties count "
            "half.",
        ]
        if comparison["other_noise"]:
            text.append(
                f"Not the same noise as the baseline's, since the latents differ in shape: "
                f"{', '.join(comparison['other_noise'])}."
            )
    if prompts["categories"]:
        text.append("## By category")
        if prompts["without_category"]:
            text.append(f"{prompts['without_category']} prompts have no category; they count above alone.")
        for key in keys:
            rows = [
                [f"{category} ({n})", *(cell(m["figures"][key]["by_category"][category]) for m in models.values())]
                for category, n in prompts["categories"].items()
            ]
            text.append(table([key, *models], rows))
    return "\n\n".join(text) + "\n"
