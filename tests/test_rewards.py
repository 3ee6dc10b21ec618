"""Scorers: gradients reach the pixels, sizes and formats do not matter, names are checked."""

import pytest
import torch

from diff_instruct.rewards import load_reward
from diff_instruct.rewards.clip import ClipReward
from tests.tiny import PROMPTS


@pytest.fixture(scope="module")
def scorer(tiny_pocket):
    return ClipReward(str(tiny_pocket / "scorer"), [0.5] * 3, [0.5] * 3)


def pictures(n, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_reward_is_the_scaled_cosine(scorer, tiny_pocket):
    r = scorer(pictures(3), PROMPTS[:3])
    assert r.shape == (3,) and (r.abs() <= 1).all()
    scaled = ClipReward(str(tiny_pocket / "scorer"), [0.5] * 3, [0.5] * 3, mean=0.2, std=0.1)
    torch.testing.assert_close(scaled(pictures(3), PROMPTS[:3]), (r - 0.2) / 0.1)


def test_gradient_is_right(scorer):
    """Against finite differences, in float64, at a few pixels."""
    scorer64 = scorer.double()
    scorer64.image_features = lambda x: _features64(scorer64, x)
    x = pictures(1).double().requires_grad_()
    scorer64(x, ["a red apple"]).sum().backward()
    for place in [(0, 0, 3, 4), (0, 1, 8, 8), (0, 2, 15, 0)]:
        h = torch.zeros_like(x)
        h[place] = 1e-4
        with torch.no_grad():
            slope = (scorer64(x + h, ["a red apple"]) - scorer64(x - h, ["a red apple"])) / 2e-4
        assert x.grad[place].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-9)
    del scorer64.image_features
    scorer.float()


def _features64(scorer, pixels):
    features = scorer.model.get_image_features((pixels - scorer.pixel_mean) / scorer.pixel_std).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def test_saturated_pixels_keep_their_gradient(scorer):
    x = torch.full((1, 3, 16, 16), 1.02, requires_grad=True)
    r = scorer(x, ["fire"])
    r.sum().backward()
    assert x.grad.abs().max() > 0
    torch.testing.assert_close(r, scorer(torch.ones(1, 3, 16, 16), ["fire"]))


@pytest.mark.parametrize("height, width", [(16, 16), (32, 32), (20, 40), (8, 8)])
def test_any_size(scorer, height, width):
    x = torch.rand(2, 3, height, width, requires_grad=True)
    scorer(x, PROMPTS[:2]).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_scores_do_not_depend_on_the_batch(scorer):
    together = scorer(pictures(4), PROMPTS[:4])
    alone = [scorer(pictures(4)[i : i + 1], [PROMPTS[i]])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_nothing_of_a_scorer_is_trained(scorer):
    assert not scorer.model.training
    assert all(not p.requires_grad for p in scorer.parameters())


def test_unknown_reward_lists_the_known():
    with pytest.raises(ValueError, match="unknown reward `beauty`; known are pocket, pocket_heldout, clip"):
        load_reward("beauty")
