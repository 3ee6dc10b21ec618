"""What a run holds in memory, and that nothing that saves some changes its results."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

import train_diff_instruct_pp as script
from diff_instruct.export.tensors import save_network
from diff_instruct.models import actors as actors_module
from diff_instruct.models.activations import Live, activations
from diff_instruct.models.families import FAMILIES
from diff_instruct.models.lora import Merged, add_lora, merged, trained_parameters
from diff_instruct.models.sources import models_of
from diff_instruct.training.arguments import parse_args
from tests.runs import run, same, weights


TARGETS = FAMILIES["PixArtAlphaPipeline"].lora_targets


@pytest.fixture
def adapted(tiny_model):
    """(plain network, the same with adapters that do something)."""
    plain, network = (PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer") for _ in range(2))
    add_lora(network, "generator", 2, 4, TARGETS)
    for p in trained_parameters(network, "generator").values():
        torch.nn.init.normal_(p, std=0.3)
    return plain, network


@pytest.mark.parametrize("size", ["10GB", "5KB"])
def test_merging_writes_what_diffusers_would_with_one_tensor_in_memory(adapted, tmp_path, monkeypatch, size):
    """Names, values, shards and index; and no tensor is made before the one before it is gone."""
    plain, network = adapted
    plain.load_state_dict({k: make() for k, make in merged(network, "generator").items()})
    plain.save_pretrained(tmp_path / "whole", max_shard_size=size)

    make, made = Merged.__call__, []

    def counted(weight):
        assert sum(tensor() is not None for tensor in made) <= 1  # the caller's name for the one before
        tensor = make(weight).clone()
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Merged, "__call__", counted)
    save_network(network, tmp_path / "streamed", merged(network, "generator"), max_shard_size=size)
    whole, streamed = (sorted((tmp_path / name).iterdir()) for name in ("whole", "streamed"))
    assert [p.name for p in whole] == [p.name for p in streamed] and len(made) == len(plain.state_dict())
    assert (len(whole) > 3) == (size == "5KB")
    for one, other in zip(whole, streamed):
        if one.suffix == ".safetensors":
            one, other = load_file(one), load_file(other)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "streamed").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in plain.state_dict().items())


def test_a_tensor_of_another_shape_is_not_written(adapted, tmp_path):
    state = merged(adapted[1], "generator")
    state["proj_out.bias"].weight = torch.zeros(3)
    with pytest.raises(ValueError, match="expected a tensor"):
        save_network(adapted[1], tmp_path, state)


@pytest.mark.parametrize("options", [["--offload_text_encoder"], ["--prompt_cache"]])
def test_text_encoders_away_from_the_device_change_nothing(tiny_args, tmp_path, monkeypatch, options):
    """The same weights; encoders are asked for only while prompts are encoded, and not at all when a cache is full."""
    inside, on_device = [], actors_module.on_device

    def watched(modules, device):
        inside.append([type(module).__name__ for module in modules])
        return on_device(modules, device)

    monkeypatch.setattr(actors_module, "on_device", watched)
    run([*tiny_args, "--output_dir", tmp_path / "plain"])
    assert not inside
    away = [*tiny_args, *options, *([tmp_path / "cache"] if "--prompt_cache" in options else [])]
    run([*away, "--output_dir", tmp_path / "away"])
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "away"))
    assert inside and all(names == ["T5EncoderModel"] for names in inside)
    if "--prompt_cache" in options:
        first = len(inside)
        run([*away, "--output_dir", tmp_path / "again"])
        assert same(weights(tmp_path / "away"), weights(tmp_path / "again"))
        assert len(inside) - first == 1  # the reference's own pipeline, for the pictures


@pytest.mark.parametrize(
    "options",
    [[], ["--lora_rank", 2, "--ta_lora_rank", 2, "--gradient_checkpointing", "--mixed_precision", "bf16"]],
)
def test_predicted_activations_are_those_of_a_run(tiny_args, monkeypatch, options):
    """The TA's phase of a real run, counted while it runs, against what is said before anything is loaded."""
    seen, ta_loss, backward = {}, script.ta_loss, Accelerator.backward
    args = parse_args([str(a) for a in [*tiny_args, *options]])
    algorithm = script.Batch, ta_loss, script.generator_gradient
    predicted = activations(args, models_of(args), args.mixed_precision or "no", algorithm)
    assert predicted.keys() == {"teaching assistant's step", "generator's step", "validation"}

    def counted(*arguments):
        with Live() as live:
            loss = ta_loss(*arguments)
            seen["live"] = live
        return loss

    def counted_backward(accelerator, loss, **options):
        live = seen.pop("live", None)
        with live or nullcontext():
            backward(accelerator, loss, **options)
        seen.setdefault("peaks", []).append(live.peak if live else 0)

    monkeypatch.setattr(script, "ta_loss", counted)
    monkeypatch.setattr(Accelerator, "backward", counted_backward)
    run([*tiny_args, *options, "--max_train_steps", 1, "--validation_steps", 0, "--checkpointing_steps", 0])
    assert predicted["teaching assistant's step"] == pytest.approx(seen["peaks"][0], rel=0.1)
    assert predicted["generator's step"] > predicted["teaching assistant's step"] / 2


def test_what_fits_is_said(tiny_args, capsys):
    """A large memory: a larger batch; a small one: flags; a tiny one: that it does not fit."""
    for gib, words in ((1, "so does a batch of about"), (1e-6, "does not fit into 1e-06 GiB")):
        run([*tiny_args, "--dry_run", "--memory_gib", gib])
        assert words in capsys.readouterr().out
