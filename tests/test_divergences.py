"""The generator's step of each method with real networks: full and LoRA TA, checkpointing, what it leaves behind."""

import copy
import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from diff_instruct.families import FAMILIES
from diff_instruct.models.actors import Actors
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.lora import acting, add_lora, lora_layers, merged, trained_parameters
from diff_instruct.terms import IKL, DiffusedReward, ScoreDistance
from diff_instruct.training import finish
from diff_instruct.training.arguments import build_parser, parse_args
from diff_instruct.training.methods import METHODS
from diff_instruct.training.optimizer import Trained
from tests.runs import run, watch_actors, weights


SCORE = ["--divergence", "score", "--huber_c", 0.1]
DIDR = ["--reward_mode", "diffused", "--diffused_reward_steps", 2]


@pytest.fixture
def watch(monkeypatch):
    """The actors of a run, how often each block of theirs ran, and the parts of dL/dx0 of each generator step."""
    seen = {"calls": [], "gradients": []}

    def look(actors):
        seen["actors"] = actors
        for role in ("ta", "ref"):
            network = getattr(actors, role).network
            network.transformer_blocks[0].register_forward_pre_hook(lambda *_, role=role: seen["calls"].append(role))

    def draw_reference(*args, original=finish.draw_reference):  # after training: not counted
        seen["trained"] = [seen["calls"].count(role) for role in ("ta", "ref")]
        return original(*args)

    def watched(original):
        def gradient(term, noised):
            parts = original(term, noised)
            seen["gradients"].append(torch.stack(list(parts.values())))
            return parts

        return gradient

    watch_actors(monkeypatch, look)
    monkeypatch.setattr(finish, "draw_reference", draw_reference)
    for term in (IKL, ScoreDistance, DiffusedReward):
        monkeypatch.setattr(term, "gradient", watched(term.gradient))
    return seen


def move_ta(actors):
    """Take a LoRA TA well away from the reference."""
    rng = torch.Generator().manual_seed(3)
    for p in trained_parameters(actors.ta.network, "ta").values():
        p.data = torch.randn(p.shape, generator=rng) * 0.3


def move_full_ta(actors):
    """The same function as after `move_ta`, as a full network."""
    lora = add_lora(copy.deepcopy(actors.ref.network), "ta", 2, 2, FAMILIES["PixArtAlphaPipeline"].lora_targets)
    move_ta(Actors(actors.stock, actors.pipe, {"ta": Denoiser(actors.pipe, lora, "ta")}))
    actors.ta.network.load_state_dict({k: make() for k, make in merged(lora, "ta").items()})


@pytest.mark.parametrize("method", [SCORE, DIDR])
@pytest.mark.parametrize("checkpointing", [pytest.param([], marks=pytest.mark.slow), ["--gradient_checkpointing"]])
def test_lora_gradient_equals_that_of_the_merged_network(
    quick_args, tmp_path, monkeypatch, watch, method, checkpointing
):
    """LoRA's TA and reference are one module: its adapters must be as they were when a block is run again."""
    still = ["--ta_learning_rate", 1e-30, "--max_train_steps", 1, "--adam_epsilon", 1e-3, *method]
    gradients = {}
    lora = ["--ta_lora_rank", 2, *checkpointing]
    for name, move, options in (("lora", move_ta, lora), ("merged", move_full_ta, [])):
        with monkeypatch.context() as m:
            watch_actors(m, move)
            run([*quick_args, *still, *options, "--output_dir", tmp_path / name])
        gradients[name] = [watch["gradients"].pop() for _ in range(len(watch["gradients"]))]
    assert len(gradients["lora"]) == (1 if method is SCORE else 2)
    for one, other in zip(gradients["lora"], gradients["merged"]):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    one, other = weights(tmp_path / "lora"), weights(tmp_path / "merged")
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [[], ["--ta_lora_rank", 2], ["--ta_lora_rank", 2, "--lora_rank", 2]])
@pytest.mark.parametrize("method", [[], SCORE, DIDR])
def test_generator_s_step_leaves_no_gradient_on_ta_and_reference(quick_args, monkeypatch, watch, method, options):
    found, step = [], Trained.step

    def watched(self):
        if self.name == "generator":
            own, actors = set(self.parameters.values()), watch["actors"]
            others = {p for actor in (actors.ta, actors.ref) for p in actor.network.parameters()} - own
            found.extend(p.grad is None for p in others)
            assert any(p.grad is not None for p in own)
        return step(self)

    monkeypatch.setattr(Trained, "step", watched)
    run([*quick_args, "--max_train_steps", 2, *method, *options])
    assert found and all(found)


@pytest.mark.parametrize(
    "method, reference_calls", [([], 1), ([*SCORE], 1), ([*DIDR], 2), ([*DIDR, "--cfg_scale", 1], 2)]
)
def test_no_network_runs_twice(quick_args, watch, method, reference_calls):
    """An iteration: the TA once in each network's step, the reference once, for c and ∅ together (k times for D_k)."""
    run([*quick_args, "--max_train_steps", 1, *method])
    assert watch["trained"] == [2, reference_calls]


@pytest.mark.parametrize("method", [[], pytest.param(SCORE, marks=pytest.mark.slow), DIDR])
def test_guidance_acts_within_its_interval_alone(quick_args, watch, method):
    """Below every t of π(t): the gradient of no guidance, to rounding; and another one with guidance everywhere."""
    gradients = []
    for options in (["--cfg_interval", 0, 0.01], ["--cfg_scale", 1], []):
        run([*quick_args, "--max_train_steps", 1, "--overwrite_output_dir", *method, *options])
        gradients.append(watch["gradients"][0].sum(dim=0))
        watch["gradients"].clear()
    outside, none, everywhere = gradients
    size = none.abs().max().item()
    torch.testing.assert_close(outside, none, rtol=1e-3, atol=1e-4 * size)
    assert (everywhere - none).abs().max() > 0.1 * size


def test_checkpointing_runs_the_blocks_of_both_networks_again(quick_args, watch):
    calls = []
    for extra in ([], ["--gradient_checkpointing"]):
        run([*quick_args, "--max_train_steps", 1, "--overwrite_output_dir", *SCORE, *extra])
        calls.append(watch["trained"])
        watch["calls"].clear()
    assert calls == [[2, 1], [4, 2]]
    plain, checkpointed = watch["gradients"]
    torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_roles_put_back_what_they_found(tiny_model):
    """Two adapters in one base: who acts, and what requires a gradient, is as before; the roles differ."""
    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    for name in ("ta", "generator"):
        add_lora(network, name, 2, 2, FAMILIES["PixArtAlphaPipeline"].lora_targets)
    layers, names = lora_layers(network), {}
    for name in ("ta", "generator"):
        names[name] = trained_parameters(network, name)
        for p in names[name].values():
            p.requires_grad_(name == "ta")
            torch.nn.init.normal_(p, std=0.3)
    assert names["ta"] and not names["ta"].keys() & names["generator"].keys()
    flags = {k: p.requires_grad for k, p in network.named_parameters()}
    assert any(flags.values())

    def who():
        return {None if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}

    before, outputs, by_peft = who(), [], copy.deepcopy(network)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([100])
    c = {"encoder_hidden_states": torch.randn(1, 3, 16), "encoder_attention_mask": torch.ones(1, 3)}
    c |= {"timestep": t, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    for role in ("generator", None, "ta"):
        with acting(layers, role):
            assert who() == {None if role is None else (role,)}
            with pytest.raises(KeyError), acting(layers, None):
                assert who() == {None}
                raise KeyError
            assert who() == {None if role is None else (role,)}
            outputs.append(network(x, **c))
        assert flags == {k: p.requires_grad for k, p in network.named_parameters()}
        for layer in lora_layers(by_peft):
            layer.enable_adapters(role is not None)
            if role is not None:
                layer.set_adapter(role)
        assert torch.equal(outputs[-1][0], by_peft(x, **c)[0])
    assert who() == before
    one, two, three = (output[0] for output in outputs)
    assert min((one - two).abs().max(), (one - three).abs().max(), (two - three).abs().max()) > 1e-3


def test_diffused_reward_does_not_depend_on_the_micro_batch(quick_args, tmp_path):
    for size in (1, 2):
        options = ["--max_train_steps", 2, "--reward_batch_size", size, "--adam_epsilon", 1e-3, *DIDR]
        run([*quick_args, *options, "--output_dir", tmp_path / str(size)])
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("preset", METHODS)
def test_every_preset_runs(quick_args, tmp_path, preset):
    run([*quick_args, "--preset", preset, "--max_train_steps", 2])
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in history if "ta_loss" in row]
    rewarded = METHODS[preset].defaults.get("reward_scale") != 0
    assert len(rows) == 2 and all(row["norm_divergence"] > 0 for row in rows)
    assert all((row.get("norm_reward", 0) > 0) == rewarded for row in rows)
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert summary["arguments"]["preset"] == preset and summary["skipped_steps"] == 0


def test_presets_set_arguments_and_given_ones_win(tmp_path):
    known = vars(build_parser().parse_args([]))
    assert all(key in known for method in METHODS.values() for key in method.defaults)
    out = ["--output_dir", str(tmp_path)]
    args = parse_args([*out, "--preset", "di++", "--cfg_scale", "2"])
    assert (args.reward_scale, args.cfg_scale, args.divergence) == (10, 2, "ikl")
    assert args.learning_rate == parse_args(out).learning_rate  # the pocket's own settings stay
    assert parse_args([*out, "--preset", "didr"]).reward_mode == "diffused"
    large = ["--pretrained_model_name_or_path", "some/model", "--train_prompts", __file__, *out]
    for preset, numbers in (("di*", (100, 7.5)), ("sim", (0, 7.5))):  # as published for SDXL; the pocket has its own
        args = parse_args([*large, "--preset", preset])
        assert (args.reward_scale, args.cfg_scale, args.divergence) == (*numbers, "score")
        assert parse_args([*out, "--preset", preset]).cfg_scale == 4.5
    bare = parse_args(out)
    assert (bare.divergence, bare.reward_mode, bare.reward_scale, bare.cfg_scale) == ("ikl", "clean", 10, 4.5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--huber_c", "0"], "--huber_c must be a positive number"),
        (["--reward_mode", "diffused", "--divergence", "score"], "--reward_mode diffused needs --divergence ikl"),
        (["--diffused_reward_steps", "0"], "--diffused_reward_steps must be a whole number of at least 1"),
        (["--ta_learning_rate", "0"], "--ta_learning_rate must be a positive number"),
    ],
)
def test_mistakes_end_with_one_line(tiny_args, options, message):
    with pytest.raises(ValueError, match=message):
        parse_args([*tiny_args, *options])
