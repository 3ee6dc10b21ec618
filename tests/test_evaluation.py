"""Intervals, the figures of the summary, and fixed noise."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, PixArtAlphaPipeline

from diff_instruct.evaluation.judge import diversity, pixel_features
from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.pictures import draw_reference
from diff_instruct.evaluation.statistics import compare, interval, mean_with_interval
from diff_instruct.models.configs import ModelSource
from diff_instruct.models.sources import read_models


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        mean, (low, high) = mean_with_interval(torch.randn(60, 4, generator=rng), n_resamples=300)
        inside += low <= 0 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize("n, share", [(2, 0.50), (4, 0.80), (16, 0.91)])
def test_interval_of_few_prompts_covers_as_often_as_is_said(n, share):
    """The shares that reports, cards and docs/evaluation.md name, of normal values."""
    rng = torch.Generator().manual_seed(n)
    intervals = [mean_with_interval(torch.randn(n, 1, generator=rng), n_resamples=400)[1] for _ in range(1500)]
    assert sum(low <= 0 <= high for low, high in intervals) / 1500 == pytest.approx(share, abs=0.03)


def test_one_prompt_has_no_interval():
    assert mean_with_interval(torch.tensor([[1.0, 3.0]])) == (2.0, None)
    assert interval(None) == "" and interval([1, 2.5], 1) == " [1.0, 2.5]"
    summary = compare({"reward": torch.ones(1, 2)}, {"reward": torch.zeros(1, 2)})
    assert summary["reward_gain"] == -1 and summary["reward_gain_ci95"] is None


@pytest.mark.parametrize("n", [2, 3, 8])
def test_diversity_of_equal_pictures_is_0(n):
    """Also of those of one colour, which have no features; and it is 1 − cosine of others."""
    for picture in (torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.3), torch.zeros(3, 32, 32)):
        assert diversity(pixel_features(picture.expand(n, -1, -1, -1))).item() == pytest.approx(0, abs=1e-6)
    features = pixel_features(torch.rand(n, 3, 32, 32))
    pairs = [1 - features[i] @ features[j] for i in range(n) for j in range(n) if i != j]
    assert diversity(features).item() == pytest.approx(sum(pairs).item() / len(pairs), abs=1e-6)


def test_interval_counts_prompts_not_images():
    """Images of one prompt are alike: repeating them must not narrow the interval."""
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    assert mean_with_interval(values) == mean_with_interval(values.repeat(1, 8))


def test_gain_is_paired():
    before = {"reward": torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 10}
    summary = compare(before, {"reward": before["reward"] + 1})
    assert summary["reward_gain"] == pytest.approx(1) and summary["reward_gain_ci95"] == pytest.approx([1, 1])


def test_noise_is_fixed_and_differs_by_prompt_and_seed():
    z = fixed_noise((1, 2, 2), 0, 3)
    assert torch.equal(z, fixed_noise((1, 2, 2), 0, 3))
    assert not torch.equal(z[0], z[1]) and not torch.equal(z, fixed_noise((1, 2, 2), 1, 3))


def test_a_reference_whose_sampler_draws_noise_draws_the_same_pictures_again(tiny_model):
    """Whatever was drawn in between, as where a run is resumed. Such a sampler is SANA-Sprint's own, too."""
    stock = PixArtAlphaPipeline.from_pretrained(tiny_model)
    stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
    given = (
        read_models(ModelSource(tiny_model)),
        stock,
        ["a red apple"],
        fixed_noise((4, 8, 8), 0, 1),
        (16, 16),
        2.0,
        3,
    )
    first = draw_reference(*given)
    torch.rand(7)
    assert torch.equal(first, draw_reference(*given))
