"""What a run tells at once when it goes wrong: Trackio shows it in its terminal and on its page."""

from importlib import import_module


X0_STD, DIVERSITY = (0.7, 1.4), 0.9  # a healthy x0's deviation; the part of the start's diversity that is to stay


class Alerts:
    """Looks at each logged row; a condition is told when it begins, and again only after it was over.

    Non-finite steps; the first held-out score below its best while aligning; x0_std outside `X0_STD`; diversity below
    `DIVERSITY` of that before training.
    """

    def __init__(self):
        self.skipped, self.best, self.diversity, self.told = 0, None, None, set()

    def conditions(self, row):
        """(title, text, whether it holds) of what this row can say."""
        if "skipped_steps" in row:
            new, self.skipped = row["skipped_steps"] - self.skipped, row["skipped_steps"]
            yield "Gradients that are not finite", f"{new} step(s) more were skipped, {self.skipped} in all", new > 0
        if "x0_std" in row:
            low, high = X0_STD
            outside = not low <= row["x0_std"] <= high
            yield "x0 drifts", f"x0_std is {row['x0_std']:.2f}, outside {low} .. {high}: guidance too strong?", outside
        if "val_heldout" in row:
            score = row["val_heldout"]
            best = self.best = score if self.best is None else max(self.best, score)
            yield "Held-out score below its best", f"{score:.3f} after {best:.3f}: is the reward hacked?", score < best
        if "val_diversity" in row:
            value = row["val_diversity"]
            start = self.diversity = value if self.diversity is None else self.diversity
            text = f"{value:.3f}, at the start {start:.3f}: less guidance or reward"
            yield f"Diversity below {DIVERSITY:.0%} of the start", text, value < DIVERSITY * start

    def __call__(self, step, row):
        """[(title, text)] of what begins with this row."""
        begun = []
        for title, text, holds in self.conditions(row):
            if holds and title not in self.told:
                begun.append((title, f"step {step}: {text}"))
            (self.told.add if holds else self.told.discard)(title)
        return begun


def send(accelerator, alerts):
    """Hand alerts to Trackio, if it is a tracker of this run."""
    for title, text in alerts:
        if any(tracker.name == "trackio" for tracker in accelerator.trackers):
            import_module("trackio").alert(title, text)
