"""Pictures and tables that an evaluation or a training run left, for the page."""

import json
from pathlib import Path

from diff_instruct.evaluation.report import table
from diff_instruct.export.card import figures_table
from diff_instruct.mistake import Mistake


PER_MODEL = 24


def gallery(path):
    """((file, caption) of the pictures, Markdown) of an `evaluation.json` or a training run's folder.

    Raises:
        Mistake: if it is neither.
    """
    path = Path(path)
    if path.name == "evaluation.json" and path.is_file():
        return of_evaluation(path)
    if (path / "evaluation.json").is_file():
        return of_evaluation(path / "evaluation.json")
    if (path / "training_summary.json").is_file():
        summary = json.loads((path / "training_summary.json").read_text())
        return [(str(file), file.stem) for file in sorted(path.glob("*.png"))], figures_table(summary)
    raise Mistake(f"--gallery {path} is neither an evaluation.json nor the --output_dir of a training run")


def of_evaluation(file):
    """Of the folder that `evaluate_one_step.py` wrote: some pictures of each model, and the means."""
    result = json.loads(file.read_text())
    items = [
        (str(sheet), "all models, the same noise") for sheet in [file.parent / "evaluation.png"] if sheet.is_file()
    ]
    for name in result["models"]:
        drawn = sorted((file.parent / "images" / name).glob("*.png"))[:PER_MODEL]
        items += [(str(p), f"{name}, prompt {int(p.stem.split('-')[0])}") for p in drawn]
    keys = list(next(iter(result["models"].values()))["figures"])
    rows = [
        [name, *(f"{model['figures'][key]['mean']:.3f}" for key in keys)] for name, model in result["models"].items()
    ]
    return items, table(["", *keys], rows)
