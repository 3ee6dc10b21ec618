"""Runs of a few steps on the tiny model: what is written, what is trained, what survives a kill."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from diff_instruct.terms import CleanReward
from diff_instruct.training.ema import ema_decay
from diff_instruct.training.history import TIMINGS
from diff_instruct.training.optimizer import Trained
from tests.runs import checkpoints, history, run, same, trained, watch_actors, weights


def assert_curves(rows, expected, hint):
    """Row by row the same figures, up to what processors round differently; others are others' timings."""
    assert [row.keys() for row in rows] == [row.keys() - set(TIMINGS) for row in expected], hint
    for row, known in zip(rows, expected):
        for name, value in row.items():
            assert value == pytest.approx(known[name], rel=1e-3, abs=1e-5), f"{name} of step {row['step']}: {hint}"


CURVES = Path(__file__).parent / "data" / "reference_curves.jsonl"


def test_a_run_writes_all_that_it_promises(tiny_args, tmp_path, capsys, curves_drawn, reference_drawn):
    run(tiny_args)
    out = tmp_path / "out"
    expected = [json.loads(line) for line in CURVES.read_text().splitlines()]
    assert_curves(history(out), expected, f"if the change is meant, copy {out / 'history.jsonl'} to {CURVES.name}")
    for name in ("model_index.json", "README.md", "samples.png", "curves.png", "pipeline_one_step.py"):
        assert (out / name).stat().st_size > 0
    summary = json.loads((out / "training_summary.json").read_text())
    for key in ("reward", "heldout", "diversity"):
        low, high = summary[f"{key}_gain_ci95"]
        assert low <= summary[f"{key}_after"] - summary[f"{key}_before"] <= high
    assert summary["n_prompts"] == 3 and summary["n_images"] == 6 and summary["seconds"] > 0
    assert [row["step"] for row in history(out) if "ta_loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in history(out) if "val_reward" in row] == [0, 2, 4]
    assert list((out / "logs").rglob("events*"))
    card = (out / "README.md").read_text()
    assert "{{" not in card and f"{summary['reward_after']:.3f}" in card
    assert "from diffusers import DiffusionPipeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, method",
    [
        ([], "Diff-Instruct++"),
        (["--preset", "sim", "--lora_rank", 2], "Score Implicit Matching"),
        (["--preset", "didr", "--pretrain_steps", 1], "Diff-Instruct with Diffused Reward"),
    ],
)
def test_the_model_card_is_filled_from_the_run(tiny_args, tmp_path, options, method):
    run([*tiny_args, *options])
    out, summary = tmp_path / "out", json.loads((tmp_path / "out" / "training_summary.json").read_text())
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"diffusers", "one-step", "diff-instruct"} <= set(card.data.tags)
    assert "{{" not in card.text and "{%" not in card.text
    assert "None" not in re.sub(r"```(json|python).*?```", "", card.text, flags=re.S)
    assert f"{method} in 4 steps" in card.text and card.text.count("@article") == len({method, "Diff-Instruct++"})
    assert all(
        f"{summary[f'{k}_{when}']:.3f}" in card.text for k in ("reward", "heldout") for when in ("before", "after")
    )
    assert all((out / name).is_file() for name in re.findall(r"!\[\w+\]\((.*?)\)", card.text))
    assert json.loads(re.search(r"```json\n(.*?)```", card.text, flags=re.S)[1]) == summary["arguments"]
    for code in re.findall(r"```python\n(.*?)```", card.text, flags=re.S):
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    "options",
    [[], *(pytest.param(alone, marks=pytest.mark.slow) for alone in (
        ["--ta_lora_rank", 2], ["--gradient_checkpointing"], ["--mixed_precision", "bf16"],
     )),
     ["--ta_lora_rank", 2, "--mixed_precision", "bf16", "--gradient_checkpointing"],
     ["--divergence", "score", "--mixed_precision", "bf16", "--gradient_checkpointing"],
     ["--divergence", "score", "--ta_lora_rank", 2, "--mixed_precision", "bf16", "--gradient_checkpointing"],
     ["--reward_mode", "diffused", "--ta_lora_rank", 2, "--mixed_precision", "bf16"]],
)  # fmt: skip
def test_only_generator_and_ta_are_trained(tiny_args, monkeypatch, options):
    """After a run: every trained parameter has moved; the reference's outputs are the same bit for bit."""
    seen = {}

    def plain(network):
        return {k.replace(".base_layer", ""): v.clone() for k, v in network.state_dict().items() if "lora" not in k}

    def look(actors):
        seen.update(actors=actors, before=plain(actors.ref.network))
        for name in ("generator", "ta"):
            network = getattr(actors, name).network
            names = {k for k in network.state_dict() if "lora" in k} or set(network.state_dict())
            seen[name] = {k: v.clone() for k, v in network.named_parameters() if k in names}

    watch_actors(monkeypatch, look)
    run([*tiny_args, *options])
    actors, ta = seen["actors"], dict(seen["actors"].ta.network.named_parameters())
    assert same(seen["before"], plain(actors.ref.network))
    assert seen["ta"].keys() == {k for k, v in ta.items() if v.requires_grad}
    assert all("lora" in k for k in seen["ta"]) == ("--ta_lora_rank" in options)
    assert all(ta[k].dtype == torch.float32 and not torch.equal(ta[k], v) for k, v in seen["ta"].items())
    generator = dict(actors.pipe.transformer.named_parameters())
    assert all(v.dtype == torch.float32 and not torch.equal(v, seen["generator"][k]) for k, v in generator.items())
    for network in (actors.stock.vae, actors.stock.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    "options",
    [[], ["--ta_lora_rank", 2], ["--gradient_accumulation_steps", 2, "--ta_steps", 2], ["--preset", "didr"]],
)
def test_killed_and_resumed_equals_never_stopped(tiny_args, tmp_path, monkeypatch, options):
    """Pretrain 2 and align 4 steps; killed in step 4, after checkpoint-2 (between the stages) was written."""
    options, steps, step = [*tiny_args, "--pretrain_steps", 2, *options], [], Trained.step
    monkeypatch.setattr(Trained, "step", lambda self: (steps.append(self.name == "generator"), step(self))[1])
    run([*options, "--output_dir", tmp_path / "whole"])

    calls = []

    update_average = Trained.update_average

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update_average(*args)

    with monkeypatch.context() as m:
        m.setattr(Trained, "update_average", killed)
        with pytest.raises(KeyboardInterrupt):
            run([*options, "--output_dir", tmp_path / "killed"])
    assert checkpoints(tmp_path / "killed") == ["checkpoint-2"]
    run([*options, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest"])

    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    summaries = [json.loads((tmp_path / n / "training_summary.json").read_text()) for n in ("whole", "killed")]
    for key in ("reward_before", "reward_after", "heldout_after", "diversity_after"):
        assert summaries[0][key] == summaries[1][key]
    assert history(tmp_path / "whole") == history(tmp_path / "killed")
    assert sum(steps) == 6 + 4 + 4  # whole; killed in step 4; resumed from step 2 instead of started again


def test_a_half_written_checkpoint_is_ignored(tiny_args, tmp_path, monkeypatch):
    run([*tiny_args, "--max_train_steps", 2])
    (tmp_path / "out" / "partial-checkpoint-9").mkdir()
    (tmp_path / "out" / "checkpoint-9x").mkdir()
    run([*tiny_args, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-4" in checkpoints(tmp_path / "out")


def test_a_run_can_go_on_from_a_checkpoint_in_another_folder(tiny_args, tmp_path):
    run([*tiny_args, "--output_dir", tmp_path / "whole"])
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run([*tiny_args, "--output_dir", tmp_path / "moved", "--resume_from_checkpoint", checkpoint])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "moved"))


def test_checkpoints_total_limit(tiny_args, tmp_path):
    run([*tiny_args, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2])
    assert checkpoints(tmp_path / "out") == ["checkpoint-3", "checkpoint-4"]


def test_checkpoint_of_a_lora_ta_holds_no_base_weights(tiny_args, tmp_path):
    run([*tiny_args, "--ta_lora_rank", 2])
    state = trained(tmp_path / "out", 4, "teaching_assistant")
    assert state and all("lora" in key for key in state)


def test_average_is_what_ships(tiny_args, tiny_model, tmp_path):
    """With constant decay d: after n steps the average is d^n θ_0 + (1 − d) Σ d^(n − i) θ_i."""
    options = [*tiny_args, "--checkpointing_steps", 1, "--max_train_steps", 3, "--ema_decay", 0.8]
    run(options)
    theta = [weights(tiny_model), *(trained(tmp_path / "out", i) for i in (1, 2, 3))]
    shipped = weights(tmp_path / "out")
    for key, value in theta[1].items():
        expected = 0.8**3 * theta[0][key] + 0.2 * (0.8**2 * value + 0.8 * theta[2][key] + theta[3][key])
        torch.testing.assert_close(shipped[key], expected, atol=1e-6, rtol=1e-5)
    run([*options, "--no-use_ema", "--output_dir", tmp_path / "plain"])
    assert all(torch.equal(v, theta[3][k]) for k, v in weights(tmp_path / "plain").items() if k in theta[3])


def test_ema_decay_ramps_up_while_pretraining():
    class Args:
        ema_decay, ema_halflife, ema_rampup_ratio, pretrain_steps = 0.95, 1000, 0.05, 10**7

    assert ema_decay(Args, 10**7, 32) == 0.95
    assert ema_decay(Args, 0, 100) < 1e-6
    assert ema_decay(Args, 10**7 - 1, 100) == pytest.approx(0.5**0.1)


def test_accumulation_equals_the_larger_batch(tiny_args, tmp_path):
    common = [*tiny_args, "--max_train_steps", 2, "--adam_epsilon", 1e-3]
    run([*common, "--train_batch_size", 4, "--output_dir", tmp_path / "large"])
    run([*common, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "small"])
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for key in large:
        torch.testing.assert_close(large[key], small[key], atol=2e-6, rtol=1e-4)


def test_pretraining_uses_no_reward(tiny_args, tmp_path, monkeypatch):
    monkeypatch.setattr(CleanReward, "gradient", None)
    run([*tiny_args, "--pretrain_steps", 3, "--max_train_steps", 0])
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["steps"] == 3


def test_alignment_starts_from_a_pretrained_generator(tiny_args, tmp_path):
    run(
        [
            *tiny_args,
            "--pretrain_steps",
            2,
            "--max_train_steps",
            0,
            "--timestep",
            300,
            "--output_dir",
            tmp_path / "pre",
        ]
    )
    run([*tiny_args, "--pretrained_generator_name_or_path", tmp_path / "pre"])
    first, second = (json.loads((tmp_path / n / "training_summary.json").read_text()) for n in ("pre", "out"))
    assert second["reward_before"] == pytest.approx(first["reward_after"], abs=1e-4)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["timestep"] == 300


@pytest.mark.parametrize(
    "options, message",
    [
        (["--pretrained_model_name_or_path", "/nowhere/at/all"], "from /nowhere/at/all: there is no such folder"),
        (["--train_prompts", "/nowhere.txt"], "--train_prompts: no such file or folder"),
        (["--reward", "beauty"], "unknown reward `beauty`; known are image_reward, hpsv2"),
        (["--output_dir", "/dev/null/out"], "--output_dir /dev/null/out cannot be made"),
        (["--prompt_cache", "/dev/null/cache"], "--prompt_cache /dev/null/cache cannot be made: /dev/null is a file"),
        (["--pair_folder", "/dev/null"], "--pair_folder /dev/null cannot be made: /dev/null is a file"),
        (["--resume_from_checkpoint", "checkpoint-7"], "checkpoint-7 is not a finished checkpoint"),
        (["--caption_column", "Prompt"], "no column `Prompt`"),
        (["--dataset_name", "user/set"], "either --dataset_name or --train_prompts"),
        (["--timestep", "1000"], r"t\* must be in 0\.\.999"),
        (["--resolution", "17"], "must be a multiple of 4"),
        (["--num_eval_images", "1"], "at least 2"),
        (["--ta_steps", "0"], "--ta_steps must be a whole number of at least 1"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(tiny_args, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        run([*tiny_args, *options])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))
