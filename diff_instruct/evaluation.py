"""Judging a generator on fixed prompt and seed pairs, with confidence intervals."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from diff_instruct.rewards.scorer import Scorer


def fixed_noise(shape, prompt_index, n, seed=1234):
    """z (n, C, H, W) for the n images of one prompt: the same in every run."""
    rngs = [torch.Generator().manual_seed(seed + 1_000_003 * prompt_index + k) for k in range(n)]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def further_noise(pipe, z, prompt_index):
    """The noise of the generator's further steps, a list of n − 1 like z, for the images of one prompt; fixed, too."""
    seeds = [1234 + 100_003 * i for i in range(1, len(pipe.timesteps))]  # not those of z, nor of another prompt
    return [fixed_noise(z.shape[1:], prompt_index, len(z), seed).to(z.device) for seed in seeds]


def pixel_features(pixels):
    """Unit vectors (B, D) of the pictures themselves, at 16×16 and without their mean: when no scorer has features."""
    small = F.interpolate(pixels, size=(16, 16), mode="area").flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=-1)


def diversity_features(reward, heldout):
    """(name, features) of what diversity is measured with: a function from pixels (B, 3, H, W) to unit vectors.

    The first held-out scorer that has image features, else the first that is trained on; users' functions have none,
    and if there is nothing else it is the pictures themselves.
    """
    scorers = {**heldout, **dict(zip(reward.names, reward.rewards))}
    for name, scorer in scorers.items():
        if isinstance(scorer, Scorer):
            return name, scorer.image_features
    return "pixels", pixel_features


@torch.no_grad()
def evaluate(accelerator, pipe, encode, prompts, n_images, latent_shape, reward, heldout):
    """Scores of `n_images` images for each prompt, every process taking its share of the prompts.

    Args:
        pipe: the generator, with the weights that are to be judged.
        encode: prompts to conditioning.
        reward ([`Mix`]): what is trained on.
        heldout (`dict`): scorers by name, may be empty.

    Returns:
        `dict` of tensors: (P, n) for `reward`, for its parts `reward_<name>` if it is more than one reward as it is,
        for the first held-out scorer `heldout` and for others `heldout_<name>`; (P,) for `diversity`: within a prompt,
        the mean of 1 − cosine between image features (see `diversity_features`).
    """
    _, features_of = diversity_features(reward, heldout)
    rows = []
    for i in range(accelerator.process_index, len(prompts), accelerator.num_processes):
        z = fixed_noise(latent_shape, i, n_images).to(accelerator.device)
        c = [prompts[i]] * n_images
        x0 = pipe.generate(pipe.denoiser, z, encode(c), further_noise(pipe, z, i))
        pixels = pipe.decode(x0).clamp(0, 1)
        parts = reward.scores(pixels, c)
        row = {"reward": reward.combine(parts)}
        if not reward.is_plain:
            row |= {f"reward_{name}": r for name, r in parts.items()}
        for k, (name, scorer) in enumerate(heldout.items()):
            row[f"heldout_{name}" if k else "heldout"] = scorer(pixels, c)
        features = features_of(pixels)
        cosine = (features @ features.T).sum() - n_images
        row["diversity"] = 1 - cosine / (n_images * (n_images - 1))
        rows.append((i, {key: value.tolist() for key, value in row.items()}))
    rows = [row for _, row in sorted(gather_object(rows), key=lambda r: r[0])]
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def mean_with_interval(values, n_resamples=2000, seed=0):
    """Mean, and its 95% interval by bootstrap over prompts (the first axis)."""
    per_prompt = values.reshape(len(values), -1).double().mean(dim=1).numpy()
    index = np.random.default_rng(seed).integers(len(per_prompt), size=(n_resamples, len(per_prompt)))
    low, high = np.percentile(per_prompt[index].mean(axis=1), [2.5, 97.5])
    return float(per_prompt.mean()), [float(low), float(high)]


def compare(before, after):
    """The figures of `training_summary.json`: means before and after, and the paired gain with its interval."""
    summary = {}
    for key in after:  # in the order of evaluation; a file keeps none
        summary[f"{key}_before"], summary[f"{key}_before_ci95"] = mean_with_interval(before[key])
        summary[f"{key}_after"], summary[f"{key}_after_ci95"] = mean_with_interval(after[key])
        summary[f"{key}_gain"], summary[f"{key}_gain_ci95"] = mean_with_interval(after[key] - before[key])
    summary["n_prompts"], summary["n_images"] = before["reward"].shape[0], before["reward"].numel()
    return summary
