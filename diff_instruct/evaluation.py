"""Judging a generator on fixed prompt and seed pairs, with confidence intervals."""

import numpy as np
import torch
from accelerate.utils import gather_object


def fixed_noise(shape, prompt_index, n, seed=1234):
    """z (n, C, H, W) for the n images of one prompt: the same in every run."""
    rngs = [torch.Generator().manual_seed(seed + 1_000_003 * prompt_index + k) for k in range(n)]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


@torch.no_grad()
def evaluate(accelerator, pipe, encode, prompts, n_images, latent_shape, reward, heldout):
    """Scores of `n_images` images for each prompt, every process taking its share of the prompts.

    Args:
        pipe: the generator, with the weights that are to be judged.
        encode: prompts to conditioning.
        reward, heldout: scorers; `heldout` may be None, then `reward`'s features measure diversity.

    Returns:
        `dict` of tensors: `reward` and `heldout` (P, n), `diversity` (P,): within a prompt, the mean of 1 − cosine
        between image features of the scorer that was not trained on.
    """
    judge = heldout or reward
    rows = []
    for i in range(accelerator.process_index, len(prompts), accelerator.num_processes):
        z = fixed_noise(latent_shape, i, n_images).to(accelerator.device)
        pixels = pipe.decode(pipe.generate(pipe.denoiser, z, encode([prompts[i]] * n_images))).clamp(0, 1)
        features = judge.image_features(pixels)
        cosine = (features @ features.T).sum() - n_images
        row = {
            "reward": reward(pixels, [prompts[i]] * n_images).tolist(),
            "diversity": 1 - cosine.item() / (n_images * (n_images - 1)),
        }
        if heldout is not None:
            row["heldout"] = heldout(pixels, [prompts[i]] * n_images).tolist()
        rows.append((i, row))
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
    for key in before:
        summary[f"{key}_before"], summary[f"{key}_before_ci95"] = mean_with_interval(before[key])
        summary[f"{key}_after"], summary[f"{key}_after_ci95"] = mean_with_interval(after[key])
        summary[f"{key}_gain"], summary[f"{key}_gain_ci95"] = mean_with_interval(after[key] - before[key])
    summary["n_prompts"], summary["n_images"] = before["reward"].shape[0], before["reward"].numel()
    return summary
