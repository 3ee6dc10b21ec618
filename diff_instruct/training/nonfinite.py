"""Gradients that are not finite: what they come from, and an end if they keep coming."""

import json
from pathlib import Path

import torch
from accelerate.utils import gather_object

from diff_instruct.files import write_text
from diff_instruct.training.endings import NOT_FINITE, Ending


BAD_PROMPTS = "nonfinite_prompts.json"
CAUSES = {  # figures of a step, the first cause first
    "x0_mean": "the generator's images",
    "pair_loss": "loss on pairs",
    "ta_loss": "TA loss",
    "surrogate_loss": "surrogate's loss",
    "norm_divergence": "divergence",
    "norm_cfg": "guidance",
    "norm_anchor": "anchor",
    "norm_guard": "guard of norms",
    "norm_reward": "reward",
    "norm_surrogate": "surrogate",
}


class NonFinite:
    """Called after a step that was not taken. All processes see the same gradient, so all are here.

    Only then anything is looked at: the figures of a step are tensors that nobody has waited for.

    Args:
        reward ([`Mix`]): knows which of its parts was not finite.
        limit (`int`): so many steps of one network in a row end the run.
    """

    def __init__(self, accelerator, output_dir, reward, limit):
        self.accelerator, self.reward, self.limit = accelerator, reward, limit
        self.file = Path(output_dir) / BAD_PROMPTS

    def causes(self, figures):
        """What this process saw that was not finite, in words; nothing if only the backward pass was not."""
        bad = {k for k, values in figures.seen.items() if not torch.stack(values).isfinite().all()}
        rewards = self.reward.take_unsound()
        words = [CAUSES[k] for k in CAUSES if k in bad and not (k == "norm_reward" and rewards)]
        return words + [f"reward {name}" for name in rewards]

    def __call__(self, step, trained, figures, prompts):
        """Say so; after `limit` in a row write the prompts of this step's batches.

        Raises:
            Ending: after `limit` in a row.
        """
        seen = gather_object([(self.causes(figures), list(prompts))])
        causes = list(dict.fromkeys(cause for words, _ in seen for cause in words))
        why = f"the gradient of the {trained.name} was not finite in step {step + 1}"
        why += f" (not finite: {', '.join(causes)})" if causes else " (in the network's own backward pass)"
        if trained.in_a_row < self.limit:
            self.accelerator.print(f"{why}; it is not applied ({trained.in_a_row} in a row).")
            return
        if self.accelerator.is_main_process:
            prompts = [prompt for _, of_process in seen for prompt in of_process]
            bad = {"step": step + 1, "network": trained.name, "not_finite": causes, "prompts": prompts}
            write_text(self.file, json.dumps(bad, indent=2, ensure_ascii=False) + "\n")
        self.accelerator.wait_for_everyone()
        raise Ending(
            NOT_FINITE,
            f"{why}, {self.limit} times in a row; nothing was applied, the checkpoints are good. The prompts are in "
            f"{self.file}; start again with a lower learning rate, or look at what was not finite",
        )
