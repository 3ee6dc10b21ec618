"""Rewards: gradients, sizes, formats, mixes, brakes and mistakes. Whether they are the published ones: test_parity."""

import json
import math
import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import BertTokenizer, CLIPModel, CLIPTextConfig

import train_diff_instruct_pp as script
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
from diff_instruct.training.reward_scale import RewardDial, validations_since_best
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


def test_warm_up():
    assert [RewardDial(10.0, 4).scale(step) for step in (-1, 0, 1, 3, 4, 9)] == [0.0, 2.5, 5.0, 10.0, 10.0, 10.0]
    assert RewardDial(10.0).scale(0) == 10.0 and not RewardDial(10.0).measuring(0)


def test_a_ratio_is_measured_and_then_fixed():
    """α_rew = ratio · mean ‖divergence‖ / mean ‖∇r‖ of the later half of the finite steps; exact when resumed."""
    dial, steps = RewardDial(ratio=0.5, ratio_steps=3), [(1.0, 8.0), (math.nan, 1.0), (3.0, 4.0), (2.0, 6.0)]
    for step, norms in enumerate(steps):
        assert dial.measuring(step) and dial.scale(step) == 0.0 and not dial.measuring(-1)
        dial.observe(*norms)
        fresh = RewardDial(ratio=0.5, ratio_steps=3)
        fresh.load_state_dict(json.loads(json.dumps(dial.state_dict())))
        dial = fresh
    assert dial.scale(4) == dial.reward_scale == 0.5 * 10 / 5 and not dial.measuring(4)
    with pytest.raises(ValueError, match="the reward had no gradient in 1 steps"):
        RewardDial(ratio=1.0, ratio_steps=1).observe(0.0, 1.0)


def test_a_ratio_waits_for_the_teaching_assistant():
    """Its norm of the divergence as logged on the pocket, 0.06 at first and 2.9 when it knows the generator: the first
    ten steps say 0.6, six times too little; noise alone does not put it off, and after `most_steps` it has an end."""

    def found(norm, **options):
        dial, rng = RewardDial(ratio=1.0, ratio_steps=10, **options), random.Random(0)
        for step in range(1000):
            if not dial.measuring(step):
                return step, dial.reward_scale
            dial.observe(0.5, norm(step) * rng.uniform(0.9, 1.1))

    grows = lambda step: 3 * (1 - 0.98 * math.exp(-step / 60))  # noqa: E731
    assert found(grows) == (640, pytest.approx(6, rel=0.02))
    assert found(grows, most_steps=250) == (250, pytest.approx(6, rel=0.1))
    assert found(lambda step: 3) == (10, pytest.approx(6, rel=0.05))
    assert found(lambda step: step, most_steps=25) == (25, pytest.approx(36, rel=0.05))


def test_a_run_with_a_ratio(tiny_args, tmp_path):
    """After two steps the reward pulls twice as hard as the divergence in the later; history, summary, card say so."""
    run([*tiny_args, "--reward_ratio", 2, "--reward_ratio_steps", 2])
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "ta_loss" in row]
    expected = 2 * rows[1]["norm_divergence"] / rows[1]["norm_reward"]
    assert [row["reward_scale"] for row in rows] == pytest.approx([0, 0, expected, expected])
    assert summary_of(tmp_path / "out")["reward_scale"] == pytest.approx(expected)
    assert f"reward scale {expected:.4g}" in (tmp_path / "out" / "README.md").read_text()


def test_validations_since_the_best():
    assert [validations_since_best(s) for s in ([1.0], [1.0, 0.5], [1.0, 2.0, 1.0, 1.5], [1.0, 1.0])] == [0, 1, 2, 0]
    nan = float("nan")
    assert [validations_since_best(s) for s in ([nan], [nan, 1.0], [nan, 1.0, nan], [1.0, 2.0, nan])] == [0, 0, 1, 1]


FUNCTIONS = """
import torch

calls = 0

def bright(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3))

def falling(pixels, prompts):
    global calls
    calls += 1
    return torch.full((len(pixels),), -float(calls))

def wrong_shape(pixels, prompts):
    return pixels.mean()

def a_list(pixels, prompts):
    return [0.0] * len(prompts)

def detached(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3)).detach()

def nan(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3)) * float("nan")

def constant(pixels, prompts):
    return torch.zeros(len(pixels), requires_grad=True)

number = 3
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path / "mine.py"


def run(arguments):
    script.main(parse_args([str(a) for a in arguments]))


def summary_of(folder):
    return json.loads((folder / "training_summary.json").read_text())


def test_a_run_with_a_mix_and_all_brakes_and_a_tiny_decoder(tiny_args, functions, tmp_path):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    options = [
        "--reward", "pocket:0.5", f"{functions}:bright:2", "--reward_cap", "bright=0.3", "--reward_warmup_steps", 3,
        "--heldout_reward", "pocket_heldout", f"{functions}:falling", "--reward_batch_size", 1,
        "--reward_decoder", tmp_path / "taesd", "--reward_dtype", "bf16", "--gradient_checkpointing",
    ]  # fmt: skip
    run([*tiny_args, *options])
    summary = summary_of(tmp_path / "out")
    for name in ("reward", "reward_pocket", "reward_bright", "heldout", "heldout_falling", "diversity"):
        assert f"{name}_before" in summary and f"{name}_after" in summary
    assert summary["diversity_by"] == "pocket_heldout" and summary["truncated_prompts"] == {}
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "ta_loss" in row]
    for row in rows:  # the mean of what is capped is at most the capped mean
        assert row["reward"] <= 0.5 * row["reward_pocket"] + 2 * min(row["reward_bright"], 0.3) + 1e-3
    assert "pocket:0.5" in (tmp_path / "out" / "README.md").read_text()


def test_a_decoder_for_other_latents_is_a_mistake(tiny_args, tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=16,
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    with pytest.raises(ValueError, match="decodes 16 channels; the latents have 4"):
        run([*tiny_args, "--reward_decoder", tmp_path / "taesd"])
    with pytest.raises(ValueError, match="no AutoencoderTiny"):
        run([*tiny_args, "--reward_decoder", tmp_path / "nowhere"])


def test_a_held_out_reward_that_falls_stops_the_run_for_good(tiny_args, functions, tmp_path):
    options = [
        "--heldout_reward", f"{functions}:falling", "--heldout_patience", 2, "--validation_steps", 1,
        "--checkpointing_steps", 1, "--max_train_steps", 9,
    ]  # fmt: skip
    run([*tiny_args, *options])
    assert summary_of(tmp_path / "out")["steps"] == 2 and summary_of(tmp_path / "out")["stopped_early"]
    run([*tiny_args, *options, "--resume_from_checkpoint", "latest"])
    assert summary_of(tmp_path / "out")["steps"] == 2
    run([*tiny_args, "--output_dir", tmp_path / "other"])
    assert not summary_of(tmp_path / "other")["stopped_early"]


# Mistakes.


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong_shape", r"returned shape \(\); it must return a tensor of shape \(2,\)"),
        ("a_list", r"returned list; it must return a tensor of shape \(2,\)"),
        ("detached", r"without gradient; it must return a tensor of shape \(2,\)"),
        ("nan", r"NaN or infinity; it must return a tensor of shape \(2,\)"),
        ("constant", "do not depend on the pixels"),
        ("number", "has no function `number`"),
        ("nothing", "has no function `nothing`"),
    ],
)
def test_a_function_that_cannot_work_is_named(functions, name, message):
    with pytest.raises(ValueError, match=f"reward `.*mine.py:{name}`.*{message}") as error:
        load_reward(RewardSpec(f"{functions}:{name}"))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_function_that_is_only_reported_needs_no_gradient(functions):
    load_reward(RewardSpec(f"{functions}:detached"), trained=False)
    assert FunctionReward(f"{functions}:bright")(pictures(2), PROMPTS[:2]).shape == (2,)


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


@pytest.mark.parametrize(
    "options, message",
    [
        (["--reward", "beauty"], "unknown reward `beauty`; known are image_reward, hpsv2, hpsv2.1, hpsv3, pickscore"),
        (["--heldout_reward", "beauty"], "unknown reward `beauty`"),
        (["--reward", "clip:much"], "after the colon comes a finite number"),
        (["--reward", "/nowhere/mine.py:f"], "no such file: /nowhere/mine.py"),
        (["--reward", "pocket", "--heldout_reward", "pocket"], "`pocket` is given twice"),
        (["--reward_checkpoint", "clip"], "write name=value"),
        (["--reward_checkpoint", "clip=/nowhere"], "no such file or folder"),
        (["--reward_cap", "clip=2"], "`clip` is not in --reward"),
        (["--reward_cap", "pocket=high"], "the cap must be a finite number"),
        (["--heldout_patience", "2", "--validation_steps", "0"], "--validation_steps to judge it at"),
        (["--reward_warmup_steps", "-1"], "must be a whole number of at least 0"),
    ],
)
def test_arguments_that_cannot_work(tiny_args, options, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_args([*tiny_args, *options])
    assert "\n" not in str(error.value)


DATACLASS = """
from __future__ import annotations

import pickle
from dataclasses import dataclass

@dataclass
class Settings:
    factor: float = {factor}

def light(pixels, prompts):
    settings = pickle.loads(pickle.dumps(Settings()))
    return settings.factor * pixels.mean(dim=(1, 2, 3))
"""


def test_a_file_with_a_dataclass_and_a_name_that_others_have(tmp_path):
    """Its module can be found by its classes, and takes nobody's place: not json's, nor that of a namesake."""
    for factor, folder in enumerate(("a", "b"), start=1):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(DATACLASS.replace("{factor}", str(factor)))
    specs = [RewardSpec(f"{tmp_path / folder / 'json.py'}:light") for folder in ("a", "b")]
    rewards = [load_reward(spec) for spec in specs]
    assert [r(torch.ones(1, 3, 4, 4), ["fire"]).item() for r in rewards] == pytest.approx([1, 2])
    assert sys.modules["json"] is json


@pytest.mark.parametrize("heldout", [[], ["--heldout_reward", "pocket_heldout"]])
def test_a_run_without_reward(quick_args, tmp_path, capsys, heldout):
    """`--preset di` and `sim` need none: nothing is loaded, judging is left to others, and diversity remains."""
    words = [str(word) for word in quick_args]
    for flag, count in (("--reward", 2), ("--heldout_reward", 2)):
        del words[words.index(flag) : words.index(flag) + count]
    run([*words, "--preset", "sim" if heldout else "di", *heldout, "--max_train_steps", 1])
    summary = summary_of(tmp_path / "out")
    figures = {key.removesuffix("_before") for key in summary if key.endswith("_before")}
    assert figures == {"diversity", *(["heldout"] if heldout else [])} and summary["arguments"]["reward"] == "none"
    assert (summary["n_prompts"], summary["n_images"]) == (1, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(reward none; guidance" in card and "{{" not in card and "diversity: " in capsys.readouterr().out


def test_reward_is_none_only_where_nothing_is_rewarded(tiny_args):
    assert parse_args([*tiny_args, "--reward_scale", "0"]).reward == ["pocket"]  # as named: it judges
    without = [word for i, word in enumerate(tiny_args) if "--reward" not in (word, tiny_args[i - 1])]
    assert parse_args(without).reward == parse_args([*without, "--reward_ratio", "1"]).reward == ["image_reward"]
    assert parse_args([*without, "--reward_scale", "0"]).reward == ["none"]
    with pytest.raises(Mistake, match="--reward none needs --reward_scale 0"):
        parse_args([*without, "--reward", "none"])
    with pytest.raises(Mistake, match="unknown reward `none`"):
        parse_args([*without, "--reward_scale", "0", "--reward", "none", "clip"])
