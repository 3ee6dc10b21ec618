"""Means with bootstrap intervals, paired gains and wins."""

import numpy as np


# What intervals are, for whoever reads them. The shares are those of normal values: tests/test_evaluation.py.
INTERVALS = (
    "95%, by bootstrap over prompts; too narrow for few of them: with 16 it is 91%, with 4 it is 80%, with 2 50%"
)


def resampled_means(per_prompt, n_resamples, rng):
    """Means (n_resamples,) of bootstrap samples of values (P,)."""
    index = rng.integers(len(per_prompt), size=(n_resamples, len(per_prompt)))
    return per_prompt[index].mean(axis=1)


def mean_with_interval(values, n_resamples=2000, seed=0):
    """Mean, and its 95% interval by bootstrap over prompts (the first axis): see `INTERVALS`; None for one prompt."""
    per_prompt = values.reshape(len(values), -1).double().mean(dim=1).numpy()
    if len(per_prompt) == 1:
        return float(per_prompt[0]), None
    low, high = np.percentile(resampled_means(per_prompt, n_resamples, np.random.default_rng(seed)), [2.5, 97.5])
    return float(per_prompt.mean()), [float(low), float(high)]


def mean_over_categories(values, categories, n_resamples=2000, seed=0):
    """Mean over categories of their means, and its 95% interval by bootstrap over the prompts within each category;
    None if one of them has a single prompt.

    Args:
        values (`torch.Tensor`, (P,) or (P, n)): by prompt, or by prompt and image.
        categories: a list of P names.
    """
    per_prompt = values.reshape(len(values), -1).double().mean(dim=1).numpy()
    names, rng = np.array(categories), np.random.default_rng(seed)
    parts = [per_prompt[names == name] for name in sorted(set(categories))]
    mean = np.mean([part.mean() for part in parts])
    if min(map(len, parts)) == 1:
        return float(mean), None
    low, high = np.percentile(np.mean([resampled_means(p, n_resamples, rng) for p in parts], axis=0), [2.5, 97.5])
    return float(mean), [float(low), float(high)]


def interval(ci95, digits=3):
    """An interval as tables show it behind the mean, with a blank before it; nothing if there is none."""
    return "" if ci95 is None else " [{:.{d}f}, {:.{d}f}]".format(*ci95, d=digits)


def wins(a, b):
    """1 where `a` is greater than `b`, 0 where it is less, 1/2 for a tie: tensors of one shape."""
    return (a > b).double() + (a == b).double() / 2


def compare(before, after):
    """The figures of `training_summary.json`: means before and after, and the paired gain with its interval.

    Args:
        before, after (`dict`): as `evaluate` returns them.
    """
    summary = {}
    for key in after:  # in the order of evaluation; a file keeps none
        summary[f"{key}_before"], summary[f"{key}_before_ci95"] = mean_with_interval(before[key])
        summary[f"{key}_after"], summary[f"{key}_after_ci95"] = mean_with_interval(after[key])
        summary[f"{key}_gain"], summary[f"{key}_gain_ci95"] = mean_with_interval(after[key] - before[key])
    return summary
