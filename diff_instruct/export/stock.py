"""An export as the stock pipeline of its family."""

from diffusers import LCMScheduler


def stock_pipeline(pipe):
    """The export's parts in the stock pipeline, with the scheduler that takes its steps.

    It draws the export's pictures from the same z with `timesteps` those of the export and no guidance; if the export
    is one for scaled noise, from σ_t z.
    """
    family = pipe.family
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    parts["scheduler"] = LCMScheduler.from_config(pipe.scheduler.config)
    if "safety_checker" in family.unused:
        parts["requires_safety_checker"] = False
    return family.stock()(**parts, **dict.fromkeys(family.unused))
