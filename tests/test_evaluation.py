"""Intervals, the figures of the summary, and fixed noise."""

import pytest
import torch

from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.statistics import compare, mean_with_interval


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        mean, (low, high) = mean_with_interval(torch.randn(60, 4, generator=rng), n_resamples=300)
        inside += low <= 0 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_interval_counts_prompts_not_images():
    """Images of one prompt are alike: repeating them must not narrow the interval."""
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    assert mean_with_interval(values) == mean_with_interval(values.repeat(1, 8))


def test_gain_is_paired():
    before = {"reward": torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 10}
    summary = compare(before, {"reward": before["reward"] + 1})
    assert summary["reward_gain"] == pytest.approx(1) and summary["reward_gain_ci95"] == pytest.approx([1, 1])
    assert summary["n_prompts"] == 50 and summary["n_images"] == 100


def test_noise_is_fixed_and_differs_by_prompt_and_seed():
    z = fixed_noise((1, 2, 2), 0, 3)
    assert torch.equal(z, fixed_noise((1, 2, 2), 0, 3))
    assert not torch.equal(z[0], z[1]) and not torch.equal(z, fixed_noise((1, 2, 2), 1, 3))
