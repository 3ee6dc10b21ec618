"""Rewards in runs: warm-up, ratio, brakes, functions of one's own, none at all; and mistakes of the command line."""

import json
import math
import random
import sys

import pytest
import torch
from diffusers import AutoencoderTiny

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.function import FunctionReward
from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.specs import RewardSpec
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.reward_scale import RewardDial, validations_since_best
from tests.runs import run
from tests.tiny import PROMPTS


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
    assert FunctionReward(f"{functions}:bright")(torch.rand(2, 3, 16, 16), PROMPTS[:2]).shape == (2,)


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
