"""Judging a generator on fixed prompt and seed pairs, with confidence intervals."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from diff_instruct.rewards.scorer import Scorer


def noise_and_generators(shape, prompt_index, n, seed=1234):
    """`fixed_noise`, and the n random number generators that drew it, for what is drawn after it."""
    rngs = [torch.Generator().manual_seed(seed + 1_000_003 * prompt_index + k) for k in range(n)]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]), rngs


def fixed_noise(shape, prompt_index, n, seed=1234):
    """z (n, C, H, W) for the n images of one prompt: the same in every run."""
    return noise_and_generators(shape, prompt_index, n, seed)[0]


def further_noise(pipe, z, prompt_index):
    """The noise of the generator's further steps, a list of n − 1 like z, for the images of one prompt; fixed, too."""
    seeds = [1234 + 100_003 * i for i in range(1, len(pipe.timesteps))]  # not those of z, nor of another prompt
    return [fixed_noise(z.shape[1:], prompt_index, len(z), seed).to(z.device) for seed in seeds]


def pixel_features(pixels):
    """Unit vectors (B, D) of the pictures themselves, at 16×16 and without their mean: when no scorer has features."""
    small = F.interpolate(pixels, size=(16, 16), mode="area").flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=-1)


def first_features(scorers):
    """(name, features) of what diversity is measured with: a function from pixels (B, 3, H, W) to unit vectors.

    The first of the scorers (a `dict` by name) that has image features; users' functions have none, and if there is
    nothing else it is the pictures themselves.
    """
    for name, scorer in scorers.items():
        if isinstance(scorer, Scorer):
            return name, scorer.image_features
    return "pixels", pixel_features


def diversity_features(reward, heldout):
    """`first_features` of the held-out scorers, else of those that are trained on."""
    return first_features({**heldout, **dict(zip(reward.names, reward.rewards))})


def diversity(features):
    """Mean of 1 − cosine between the images of one prompt, from their unit vectors (n, D), n at least 2."""
    n = len(features)
    return 1 - ((features @ features.T).sum() - n) / (n * (n - 1))


def judge_images(pixels, prompts, reward, heldout):
    """Scores of n images (n, 3, H, W) in [0, 1] of one prompt, given n times: one row of `evaluate`'s."""
    _, features_of = diversity_features(reward, heldout)
    parts = reward.scores(pixels, prompts)
    row = {"reward": reward.combine(parts)}
    if not reward.is_plain:
        row |= {f"reward_{name}": r for name, r in parts.items()}
    for k, (name, scorer) in enumerate(heldout.items()):
        row[f"heldout_{name}" if k else "heldout"] = scorer(pixels, prompts)
    row["diversity"] = diversity(features_of(pixels))
    return row


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
    rows = []
    for i in range(accelerator.process_index, len(prompts), accelerator.num_processes):
        z, c = fixed_noise(latent_shape, i, n_images).to(accelerator.device), [prompts[i]] * n_images
        x0 = pipe.generate(pipe.denoiser, z, encode(c), further_noise(pipe, z, i))
        row = judge_images(pipe.decode(x0).clamp(0, 1), c, reward, heldout)
        rows.append((i, {key: value.tolist() for key, value in row.items()}))
    rows = [row for _, row in sorted(gather_object(rows), key=lambda r: r[0])]
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def resampled_means(per_prompt, n_resamples, rng):
    """Means (n_resamples,) of bootstrap samples of values (P,)."""
    index = rng.integers(len(per_prompt), size=(n_resamples, len(per_prompt)))
    return per_prompt[index].mean(axis=1)


def mean_with_interval(values, n_resamples=2000, seed=0):
    """Mean, and its 95% interval by bootstrap over prompts (the first axis)."""
    per_prompt = values.reshape(len(values), -1).double().mean(dim=1).numpy()
    low, high = np.percentile(resampled_means(per_prompt, n_resamples, np.random.default_rng(seed)), [2.5, 97.5])
    return float(per_prompt.mean()), [float(low), float(high)]


def mean_over_categories(values, categories, n_resamples=2000, seed=0):
    """Mean over categories of their means, and its 95% interval by bootstrap over the prompts within each category.

    Args:
        values (`torch.Tensor`, (P,) or (P, n)): by prompt, or by prompt and image.
        categories: a list of P names.
    """
    per_prompt = values.reshape(len(values), -1).double().mean(dim=1).numpy()
    names, rng = np.array(categories), np.random.default_rng(seed)
    parts = [per_prompt[names == name] for name in sorted(set(categories))]
    mean = np.mean([part.mean() for part in parts])
    low, high = np.percentile(np.mean([resampled_means(p, n_resamples, rng) for p in parts], axis=0), [2.5, 97.5])
    return float(mean), [float(low), float(high)]


def wins(a, b):
    """1 where `a` is greater than `b`, 0 where it is less, 1/2 for a tie: tensors of one shape."""
    return (a > b).double() + (a == b).double() / 2


def compare(before, after):
    """The figures of `training_summary.json`: means before and after, and the paired gain with its interval."""
    summary = {}
    for key in after:  # in the order of evaluation; a file keeps none
        summary[f"{key}_before"], summary[f"{key}_before_ci95"] = mean_with_interval(before[key])
        summary[f"{key}_after"], summary[f"{key}_after_ci95"] = mean_with_interval(after[key])
        summary[f"{key}_gain"], summary[f"{key}_gain_ci95"] = mean_with_interval(after[key] - before[key])
    summary["n_prompts"], summary["n_images"] = before["reward"].shape[0], before["reward"].numel()
    return summary
