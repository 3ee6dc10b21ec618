"""Rewards without bounds, in units of their spread over the generator's own pictures: `--reward_standardize`."""

import math

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.asking import asking, on_all


PICTURES = 128  # a spread of so many is known to 6%
ROUNDING = 1e-6  # scores in float32 that differ by no more than this share of them say the same


@torch.no_grad()
def standards_of(run):
    """`mean`, `spread` and number of `pictures` of the published score of each reward that is to be standardised, by
    name, over the first pictures that the generator makes of training prompts as the run begins. The same for any
    number of processes.

    Raises:
        NoScores: on all processes, if a reward fails.
        Mistake: if a score is not finite, or a spread is 0 or no more than rounding.
    """
    args, accelerator, reward, sampler = run.args, run.accelerator, run.reward, run.draws.sampler
    if not reward.standardized:
        return {}
    size, pipe, began = args.reward_batch_size or args.train_batch_size, run.actors.pipe, sampler.state_dict()
    batches = math.ceil(PICTURES / (args.train_batch_size * accelerator.num_processes))
    found = {name: [] for name in reward.standardized}
    for _ in tqdm(range(batches), "spread of rewards", leave=False, disable=not accelerator.is_main_process):
        batch = run.draws.batch(sampler())
        x0 = run.actors.generator.generate(batch.z, batch.c, batch.noise)
        with on_all(accelerator):
            for i in range(0, len(x0), size):
                pixels, prompts = pipe.decode(x0[i : i + size]).clamp(0, 1), batch.prompts[i : i + size]
                for name, scores in found.items():
                    with asking(f"reward `{name}`"):
                        scores += reward.part(name)(pixels, prompts).tolist()
    sampler.load_state_dict(began)
    by_process = gather_object([found])
    return {name: standard(name, [scores[name] for scores in by_process]) for name in found}


def standard(name, scores):
    """Plain numbers by name, of the first pictures; process k of n has scored the k-th, (k + n)-th and so on."""
    first = torch.tensor(scores, dtype=torch.float64).T.flatten()[:PICTURES]
    mean, spread, unsound = first.mean().item(), first.std().item(), int((~first.isfinite()).sum())
    if unsound:
        raise Mistake(
            f"--reward_standardize {name}: {unsound} of its {len(first)} scores of the generator's pictures are NaN "
            "or infinite: mend the reward"
        )
    if spread <= ROUNDING * abs(mean):
        raise Mistake(
            f"--reward_standardize {name}: over {len(first)} pictures of the generator its scores have the spread "
            f"{spread:.4g}, which nothing can be divided by: leave it out"
        )
    return {"mean": mean, "spread": spread, "pictures": len(first)}


def words_of_standards(standards):
    """A sentence on each; empty for none."""
    return " ".join(
        f"Reward `{name}` counts as (r − {of['mean']:.4g}) / {of['spread']:.4g}: mean and spread over "
        f"{of['pictures']} pictures that the generator made of training prompts at the start."
        for name, of in standards.items()
    )
