"""The generator's step of each method with real networks: full and LoRA TA, checkpointing, what it leaves behind."""

import copy
import json

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import train_diff_instruct_pp as script
from diff_instruct.models.lora import adapters, trainable
from diff_instruct.models.teaching_assistant import frozen, make_teaching_assistant
from diff_instruct.training.arguments import build_parser, parse_args
from diff_instruct.training.methods import PRESETS
from tests.test_training import run, weights


SCORE = ["--divergence", "score", "--huber_c", 0.1]
DIDR = ["--reward_mode", "diffused", "--diffused_reward_steps", 2]


@pytest.fixture
def watch(monkeypatch):
    """The networks of a run, how often each block of theirs ran, and dL/dx0 of each generator step."""
    seen = {"calls": [], "gradients": []}

    def wrap(name, record):
        original = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args: record(original(*args)))

    def count(key, network):
        network.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen["calls"].append(key))
        return network

    def keep_reference(stock):
        seen["reference"] = stock.transformer
        return stock

    def keep_ta(ta):
        if ta is not seen["reference"]:
            count("ta", ta)
        count("reference", seen["reference"])
        seen["ta"] = ta
        return ta

    def draw_reference(*args, original=script.draw_reference):  # after training: not counted
        seen["trained"] = [seen["calls"].count(key) for key in ("ta", "reference")]
        return original(*args)

    def keep_gradient(parts):
        seen["gradients"].append(torch.stack(parts) if parts[0].shape == parts[1].shape else parts[1])
        return parts

    wrap("load_reference", keep_reference)
    wrap("make_teaching_assistant", keep_ta)
    monkeypatch.setattr(script, "draw_reference", draw_reference)
    for name in ("ikl_gradient", "score_gradient", "diffused_reward_gradient"):
        wrap(name, keep_gradient)
    return seen


def lora_ta(reference, *_):
    """A LoRA TA that is well away from the reference."""
    ta = make_teaching_assistant(reference, 2, 2)
    rng = torch.Generator().manual_seed(3)
    for p in trainable(ta):
        p.data = torch.randn(p.shape, generator=rng) * 0.3
    return ta


def merged_ta(reference, *_):
    """The same function as `lora_ta`, as a full network."""
    ta = lora_ta(copy.deepcopy(reference))
    for layer in ta.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return ta.requires_grad_(True)


@pytest.mark.parametrize("method", [SCORE, DIDR])
@pytest.mark.parametrize("checkpointing", [[], ["--gradient_checkpointing"]])
def test_lora_gradient_equals_that_of_the_merged_network(
    tiny_args, tmp_path, monkeypatch, watch, method, checkpointing
):
    """LoRA's TA and reference are one module: its adapters must be as they were when a block is run again."""
    still = ["--ta_learning_rate", 1e-30, "--max_train_steps", 1, "--adam_epsilon", 1e-3, *method]
    gradients = {}
    for name, make, options in (("lora", lora_ta, ["--ta_lora_rank", 2, *checkpointing]), ("merged", merged_ta, [])):
        with monkeypatch.context() as m:
            m.setattr(script, "make_teaching_assistant", make)
            run([*tiny_args, *still, *options, "--output_dir", tmp_path / name])
        gradients[name] = [watch["gradients"].pop() for _ in range(len(watch["gradients"]))]
    assert len(gradients["lora"]) == (1 if method is SCORE else 2)
    for lora, merged in zip(gradients["lora"], gradients["merged"]):
        assert merged.abs().max() > 1e-3
        torch.testing.assert_close(lora, merged, rtol=1e-3, atol=1e-4 * merged.abs().max().item())
    one, other = weights(tmp_path / "lora"), weights(tmp_path / "merged")
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [[], ["--ta_lora_rank", 2]])
@pytest.mark.parametrize("method", [[], SCORE, DIDR])
def test_generator_s_step_leaves_no_gradient_on_ta_and_reference(tiny_args, monkeypatch, watch, method, options):
    found = []

    class Stepper(script.Stepper):
        def __call__(self):
            if self.name == "generator":
                networks = (watch["ta"], watch["reference"])
                found.extend(p.grad is None for network in networks for p in network.parameters())
                assert any(p.grad is not None for p in self.network.parameters())
            return super().__call__()

    monkeypatch.setattr(script, "Stepper", Stepper)
    run([*tiny_args, "--max_train_steps", 2, *method, *options])
    assert found and all(found)


@pytest.mark.parametrize(
    "method, reference_calls", [([], 2), ([*SCORE], 2), ([*DIDR], 4), ([*DIDR, "--cfg_scale", 1], 2)]
)
def test_no_network_runs_twice(tiny_args, watch, method, reference_calls):
    """An iteration: the TA once in each network's step, the reference once for c and once for ∅ (k times for D_k)."""
    run([*tiny_args, "--max_train_steps", 1, *method])
    assert watch["trained"] == [2, reference_calls]


def test_checkpointing_runs_the_blocks_of_both_networks_again(tiny_args, watch):
    calls = []
    for extra in ([], ["--gradient_checkpointing"]):
        run([*tiny_args, "--max_train_steps", 1, *SCORE, *extra])
        calls.append(watch["trained"])
        watch["calls"].clear()
    assert calls == [[2, 2], [4, 4]]
    plain, checkpointed = watch["gradients"]
    torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_adapters_and_frozen_put_back_what_they_found(tiny_model):
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").requires_grad_(False)
    ta = make_teaching_assistant(network, 2)
    names = {n for n, p in ta.named_parameters() if p.requires_grad}
    layers = [m for m in ta.modules() if isinstance(m, BaseTunerLayer)]
    with frozen(ta):
        with adapters(ta, False):
            assert all(layer.disable_adapters for layer in layers)
            with adapters(ta, True):
                assert not any(layer.disable_adapters for layer in layers)
            assert all(layer.disable_adapters for layer in layers)
        assert not trainable(ta)
    assert names and names == {n for n, p in ta.named_parameters() if p.requires_grad}


def test_diffused_reward_does_not_depend_on_the_micro_batch(tiny_args, tmp_path):
    for size in (1, 2):
        options = ["--max_train_steps", 2, "--reward_batch_size", size, "--adam_epsilon", 1e-3, *DIDR]
        run([*tiny_args, *options, "--output_dir", tmp_path / str(size)])
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(tiny_args, tmp_path, preset):
    run([*tiny_args, "--preset", preset, "--max_train_steps", 2])
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in history if "ta_loss" in row]
    rewarded = PRESETS[preset].get("reward_scale") != 0
    assert len(rows) == 2 and all(row["norm_divergence"] > 0 for row in rows)
    assert all((row["norm_reward"] > 0) == rewarded for row in rows)
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert summary["arguments"]["preset"] == preset and summary["skipped_steps"] == 0


def test_presets_set_arguments_and_given_ones_win(tmp_path):
    known = vars(build_parser().parse_args([]))
    assert all(key in known for values in PRESETS.values() for key in values)
    out = ["--output_dir", str(tmp_path)]
    args = parse_args([*out, "--preset", "di++", "--cfg_scale", "2"])
    assert (args.reward_scale, args.cfg_scale, args.divergence) == (10, 2, "ikl")
    assert args.learning_rate == parse_args(out).learning_rate  # the pocket's own settings stay
    assert parse_args([*out, "--preset", "didr"]).reward_mode == "diffused"
    bare = parse_args(out)
    assert (bare.divergence, bare.reward_mode, bare.reward_scale, bare.cfg_scale) == ("ikl", "clean", 10, 4.5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--huber_c", "0"], "--huber_c must be positive"),
        (["--reward_mode", "diffused", "--divergence", "score"], "--reward_mode diffused needs --divergence ikl"),
        (["--diffused_reward_steps", "0"], "--diffused_reward_steps must be at least 1"),
        (["--ta_learning_rate", "0"], "--ta_learning_rate must be positive"),
    ],
)
def test_mistakes_end_with_one_line(tiny_args, options, message):
    with pytest.raises(ValueError, match=message):
        parse_args([*tiny_args, *options])
