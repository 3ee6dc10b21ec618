"""An export as the stock pipeline of its family."""

from pathlib import Path

from diffusers import LCMScheduler
from safetensors.torch import save_file
from transformers import CLIPTextModel

from diff_instruct.export.layouts import clip_state


def stock_pipeline(pipe):
    """The export's parts in the stock pipeline, with the scheduler that takes its steps: LCM's, or, of flow matching,
    the export's own.

    It draws the export's pictures from the same z with the family's `stock_arguments`; if the export is one for scaled
    noise, from σ_t z.
    """
    family = pipe.family
    parts = {name: part for name, part in pipe.components.items() if part is not None or name in family.may_lack()}
    if not family.flow:
        parts["scheduler"] = LCMScheduler.from_config(pipe.scheduler.config)
    if "safety_checker" in family.unused:
        parts["requires_safety_checker"] = False
    return family.stock()(**parts, **dict.fromkeys(family.unused))


def rename_clip(parts, folder):
    """CLIP, where it is among the parts that were saved in a folder, by the names that every version of transformers
    reads: newer ones (5.23) write them without a prefix; older ones (5.5) take those for missing and draw the weights
    at random, with a warning."""
    for name, part in parts.items():
        if isinstance(part, CLIPTextModel):
            state = {key: weight.contiguous() for key, weight in clip_state(part).items()}
            save_file(state, Path(folder) / name / "model.safetensors", metadata={"format": "pt"})


def save_stock(pipe, folder):
    """The stock pipeline in a folder."""
    stock_pipeline(pipe).save_pretrained(folder)
    rename_clip(pipe.components, folder)
