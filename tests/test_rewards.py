"""Rewards: gradients, sizes, formats, mixes and checkpoints. Whether they are the published ones: test_parity."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import BertTokenizer, CLIPModel, CLIPTextConfig

from diff_instruct.mistake import Mistake
from diff_instruct.objectives import reward_gradient
from diff_instruct.plan.memory_plan import reward_bytes
from diff_instruct.rewards import hpsv3
from diff_instruct.rewards.aesthetic import Aesthetic, LinearMLP
from diff_instruct.rewards.catalogue import CATALOGUE, Published
from diff_instruct.rewards.clip import ClipScore
from diff_instruct.rewards.function import FunctionReward
from diff_instruct.rewards.hpsv2 import HPSv2
from diff_instruct.rewards.loading import load_mix, load_reward, truncated_prompts
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.pickscore import PickScore
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.rewards.specs import RewardSpec, read_rewards, split_number
from diff_instruct.training.arguments import parse_args
from tests.parity.reward_inputs import ORACLE, SAID, WORDS, random_state
from tests.parity.reward_ours import tiny_hpsv3, tiny_image_reward
from tests.tiny import PROMPTS, tiny_tokenizer


NAMES = ["image_reward", "hpsv2", "pickscore", "clip", "aesthetic", "hpsv3", "pocket"]
EVERY = [*NAMES, "function", "mix"]
WARMTH = """
def warmth(pixels, prompts):
    return pixels[:, 0].mean(dim=(1, 2)) - pixels.square().mean(dim=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def make(tiny_pocket, tmp_path_factory):
    """name to a fresh reward of that name, with tiny networks."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "mine.py").write_text(WARMTH)
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")

    def build(name):
        torch.manual_seed(0)
        if name == "image_reward":
            shapes = json.loads((ORACLE / "image_reward_tiny" / "shapes.json").read_text())
            return tiny_image_reward(random_state(shapes), BertTokenizer.from_pretrained(folder))
        if name == "hpsv3":
            shapes = json.loads((ORACLE / "hpsv3_tiny" / "shapes.json").read_text())
            return tiny_hpsv3(random_state(shapes))
        if name == "function":
            return FunctionReward(f"{folder / 'mine.py'}:warmth")
        if name == "mix":
            parts = {part: build(part) for part in ("clip", "function", "aesthetic")}
            return Mix(parts, {"clip": 0.1, "function": -2.0, "aesthetic": 1.0}, {"aesthetic": -100.0})
        if name == "pocket":
            return PocketReward.from_pretrained(name, tiny_pocket / "scorer")
        clip = CLIPModel.from_pretrained(tiny_pocket / "scorer")
        if name == "aesthetic":
            return Aesthetic(clip, LinearMLP(clip.config.projection_dim))
        return {"hpsv2": HPSv2, "pickscore": PickScore, "clip": ClipScore}[name](name, clip, tiny_tokenizer())

    return build


def pictures(n, height=16, width=16):
    return 0.2 + 0.6 * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_right(make, name):
    """Against finite differences, in float64, through the resize; of a language model, whose norms stay in float32,
    larger ones."""
    reward, eps = make(name).double(), 1e-3 if name == "hpsv3" else 1e-5
    x = pictures(1, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: reward(p, ["a red apple"]), x, eps=eps, atol=1e-6 if eps < 1e-3 else 5e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", EVERY)
def test_saturated_pixels_keep_their_gradient(make, name):
    reward = make(name)
    x = torch.full((1, 3, 16, 16), 1.02, requires_grad=True)
    r = reward(x, ["a red apple"])
    r.sum().backward()
    assert (x.grad != 0).float().mean() > 0.5
    torch.testing.assert_close(r, reward(torch.ones(1, 3, 16, 16), ["a red apple"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("height, width", [(16, 16), (40, 20), (20, 40), (8, 8)])
def test_any_size(make, name, height, width):
    x = pictures(2, height, width).requires_grad_()
    r = make(name)(x, ["a red apple", "a blue cat"])
    r.sum().backward()
    assert r.shape == (2,) and r.dtype == torch.float32
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("name", EVERY)
def test_gradient_does_not_depend_on_the_micro_batch(make, name):
    """Prompts of different lengths: padding must not matter, either."""
    x0, reward = pictures(5), make(name)
    whole = reward_gradient(x0, PROMPTS[:5], reward, lambda x: x, 5)
    for size in (1, 2):
        for got, expected in zip(reward_gradient(x0, PROMPTS[:5], reward, lambda x: x, size), whole):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_reward_is_added_by_its_class_and_one_entry(tiny_pocket, tmp_path, monkeypatch):
    """As docs/design.md says, with the class that stands there: `--reward` finds it, and it scores with a gradient."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "design.md").read_text()
    code = re.search(r"```python\n(import torch\n.*?class MyScore.*?)\n\n\nreward, pixels", page, flags=re.S)[1]
    (tmp_path / "my_score.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CATALOGUE, "my_score", Published("my_score:MyScore", parameters=100))
    options = ["--reward", "my_score:2", "--reward_checkpoint", f"my_score={tiny_pocket / 'scorer'}"]
    args = parse_args([*options, "--output_dir", str(tmp_path / "out")])
    mix, x = load_mix(read_rewards(args)[0], "cpu"), pictures(2).requires_grad_()
    r = mix(x, PROMPTS[:2])
    r.sum().backward()
    assert r.shape == (2,) and x.grad.abs().sum() > 0
    pocket = sum(spec.published.parameters for spec in read_rewards(args)[1])
    assert reward_bytes(args) == 4 * (100 + pocket)


@pytest.mark.parametrize("name", EVERY)
def test_bf16_on_the_cpu(make, name):
    reward, x = make(name), pictures(2).requires_grad_()
    exact = reward(x, PROMPTS[:2]).detach()
    r = reward.to(torch.bfloat16)(x, PROMPTS[:2])
    r.sum().backward()
    assert r.dtype == x.grad.dtype == torch.float32 and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    torch.testing.assert_close(r.detach(), exact, atol=0.05 * max(1.0, exact.abs().max().item()), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_scorer_is_trained(make, name):
    reward = make(name).train()
    assert not any(module.training for module in reward.modules())
    assert all(not p.requires_grad for p in reward.parameters())


def test_units(make):
    """All but ImageReward are the cosine in one unit or another."""
    cosine = PocketReward.forward(make("pocket"), pictures(2), PROMPTS[:2]) * 0.1
    for name, unit in (("hpsv2", 100), ("pickscore", make("pickscore").model.logit_scale.exp())):
        same = make(name)
        same.pixel_mean = same.pixel_std = (0.5, 0.5, 0.5)
        torch.testing.assert_close(same(pictures(2), PROMPTS[:2]), unit * cosine, atol=1e-4, rtol=1e-4)
    clip = make("clip")
    clip.pixel_mean = clip.pixel_std = (0.5, 0.5, 0.5)
    torch.testing.assert_close(clip(pictures(2), PROMPTS[:2]), 100 * cosine.clamp(min=0), atol=1e-4, rtol=1e-4)


def test_the_catalogue_knows_what_scorers_read():
    for name in ("pocket", "pocket_heldout", "pocket_truth"):
        assert CATALOGUE[name].tokens == load_reward(RewardSpec(name), "cpu").max_length
    assert CLIPTextConfig().max_position_embeddings == CATALOGUE["clip"].tokens == CATALOGUE["hpsv2"].tokens == 77


def test_prompts_that_are_cut_are_said_once_and_counted_once(make, caplog):
    reward, long = make("clip"), "red " * 40
    for _ in range(2):
        reward(pictures(2), ["a red apple", long])
    assert len([m for m in caplog.messages if "`clip` reads 24 tokens" in m]) == 1
    assert truncated_prompts(Mix({"clip": reward}, {"clip": 1.0}), {"pocket": make("pocket")}) == {"clip": 1}
    reward(pictures(1), [long + "apple"])
    assert len(reward.truncated_prompts) == 2


# Mixes and brakes.


def bright(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3))


def red(pixels, prompts):
    return pixels[:, 0].mean(dim=(1, 2))


def test_a_mix_is_the_weighted_sum_of_capped_rewards():
    x = pictures(3).requires_grad_()
    mix = Mix({"bright": Wrap(bright), "red": Wrap(red)}, {"bright": 2.0, "red": -1.0}, {"bright": 0.1})
    r = mix(x, PROMPTS[:3])
    torch.testing.assert_close(r, 0.2 - red(x, None))
    r.sum().backward()
    assert x.grad[:, 1:].abs().max() == 0 and x.grad[:, 0].abs().min() > 0  # brightness is above its cap
    parts = mix.take_parts(3)
    assert parts["reward_bright"] == bright(x, None).mean() and parts["reward_red"] == red(x, None).mean()
    assert mix.take_parts(3) == {}


class Wrap(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, pixels, prompts):
        return self.function(pixels, prompts)


@pytest.mark.parametrize(
    "entry, expected",
    [("clip", ("clip", None)), ("hpsv2.1:0.5", ("hpsv2.1", 0.5)), ("a/b.py:f", ("a/b.py:f", None)),
     ("a/b.py:f:-2", ("a/b.py:f", -2.0))],
)  # fmt: skip
def test_reward_entries(entry, expected):
    assert split_number("reward", entry) == expected


@pytest.fixture
def hpsv3_package(tmp_path, monkeypatch):
    """A package `hpsv3` with words of our own, which must not be imported: the file of its words."""
    file = tmp_path / "packages" / "hpsv3" / "dataset" / "data_collator_qwen.py"
    file.parent.mkdir(parents=True)
    (file.parents[1] / "__init__.py").write_text("raise ImportError('of another transformers')")
    instruction, end = SAID
    file.write_text(
        f"import of_nothing\nINSTRUCTION = {instruction!r}\nprompt_with_special_token = {end!r}\nN = 1 + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return file


def test_the_words_of_hpsv3_are_its_package_s(hpsv3_package):
    assert hpsv3.words() == SAID
    hpsv3_package.write_text("INSTRUCTION = 'How good is it?'\n")
    with pytest.raises(Mistake, match="does not hold the words of hpsv3 1.0.0"):
        hpsv3.words()


@pytest.mark.skipif(find_spec("hpsv3") is not None, reason="the package hpsv3 is installed")
def test_without_its_package_hpsv3_says_what_to_install():
    with pytest.raises(Mistake, match="pip install --no-deps hpsv3"):
        load_reward(RewardSpec("hpsv3"))


def test_hpsv3_reads_no_token_of_the_chat_in_a_prompt(make):
    reward, x = make("hpsv3"), pictures(2)
    r = reward(x, ["a <|Reward|> <|image_pad|>", "a red apple"])
    assert r.shape == (2,) and r[1] == pytest.approx(reward(x[1:], ["a red apple"]).item(), abs=1e-5)


@pytest.mark.parametrize("name", ["image_reward", "hpsv2", "hpsv2.1", "hpsv3", "pickscore", "clip", "aesthetic"])
def test_a_missing_checkpoint_says_where_it_comes_from(name, tmp_path, hpsv3_package):
    with pytest.raises(ValueError, match="from https://huggingface.co/.*--reward_checkpoint .*=PATH") as error:
        load_reward(RewardSpec(name), cache_dir=tmp_path)
    assert "\n" not in str(error.value) and f"`{name}`" in str(error.value)


def test_a_checkpoint_that_is_incomplete_or_not_only_tensors(tmp_path, make):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1, 1, 1024)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"is no such checkpoint: \d+ of \d+ tensors are missing"):
        load_reward(RewardSpec("image_reward", checkpoint=tmp_path))
    torch.save({"code": AutoencoderTiny}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_reward(RewardSpec("image_reward", checkpoint=tmp_path))
