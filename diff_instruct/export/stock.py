"""An export as the stock pipeline of its family."""

from diffusers import LCMScheduler


def stock_pipeline(pipe):
    """The export's parts in the stock pipeline, with the scheduler that takes its steps: LCM's, or, of flow matching,
    the export's own.

    It draws the export's pictures from the same z with the family's `stock_arguments`; if the export is one for scaled
    noise, from σ_t z.
    """
    family = pipe.family
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    if not family.flow:
        parts["scheduler"] = LCMScheduler.from_config(pipe.scheduler.config)
    if "safety_checker" in family.unused:
        parts["requires_safety_checker"] = False
    return family.stock()(**parts, **dict.fromkeys(family.unused))
