"""Runs on a rounded base: what they train and ship, stopped and resumed, predicted, and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from diff_instruct.mistake import Mistake
from diff_instruct.models.actors import load_actors
from diff_instruct.models.lora import trained_parameters
from diff_instruct.models.published import check_rounding, rounding_of
from diff_instruct.models.roles import roles_of
from diff_instruct.models.rounding import rounded_layers, stored_bytes
from diff_instruct.models.sources import models_of
from diff_instruct.plan import advice
from diff_instruct.plan.memory_plan import plan
from diff_instruct.training.arguments import parse_args
from tests.runs import history, run, same, trained, weights


LORA = ["--lora_rank", 2, "--ta_lora_rank", 2]
BF16 = [*LORA, "--gradient_checkpointing", "--mixed_precision", "bf16"]


def parsed(*arguments):
    return parse_args([str(a) for a in arguments])


@pytest.mark.parametrize("kind, options", [("int8", LORA), ("nf4", BF16)])
def test_a_run_on_a_rounded_base(tiny_args, tiny_model, tmp_path, kind, options):
    """The TA is the reference at first, so the divergence is 0; stopped after two steps and resumed it ends with the
    same; the export is the published network with the adapters; and what was judged is compared with it."""
    command = [*tiny_args, *options, "--base_quantization", kind, "--cfg_scale", 1, "--ta_learning_rate", 1e-9]
    run([*command, "--output_dir", tmp_path / "whole"])
    rows = [row for row in history(tmp_path / "whole") if "norm_divergence" in row]
    assert rows[0]["norm_divergence"] < 1e-6 * rows[0]["norm_reward"]  # the TA has taken a step of nothing
    run([*command, "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", "checkpoint-2"])
    resumed = trained(tmp_path / "whole", 4)
    run([*command, "--output_dir", tmp_path / "again"])
    assert same(resumed, trained(tmp_path / "again", 4))

    base, found = weights(tiny_model), weights(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "training_summary.json").read_text())
    difference = summary["rounded_base"]
    assert 0 < difference["pixels"] < 0.1 and difference["n_prompts"] == 3
    assert difference["reward"]["judged"] == pytest.approx(summary["reward_after"])
    assert "what is shipped is the same LoRA merged" in (tmp_path / "whole" / "README.md").read_text()
    adapters = load_file(tmp_path / "whole" / "checkpoint-4" / "generator.safetensors")
    for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"):
        a, b = (adapters[f"average.{name}.lora_{x}.generator.weight"] for x in "AB")
        torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + b @ a, rtol=0, atol=1e-6)
    assert found.keys() == base.keys() and torch.equal(found["proj_out.weight"], base["proj_out.weight"])


def test_the_plan_counts_what_is_loaded(tiny_args):
    args = parsed(*tiny_args, *BF16, "--base_quantization", "nf4")
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.bfloat16, torch.no_grad, args)
    network = actors.ref.network
    assert len(rounded_layers(network)) == len(rounding_of(models, "nf4")) and network is actors.generator.network
    adapters = sum(p.numel() for p in trained_parameters(network, "ta").values())
    rows = plan(args, models, "bf16")
    assert rows["reference"]["weights"] == stored_bytes(network, 2)
    assert rows["teaching assistant"]["weights"] == 4 * adapters
    assert [lever.words for lever in advice.levers(args, models) if "quantization" in lever.words] == []


def test_rounding_is_advised_where_it_is_not_refused(tiny_args, monkeypatch):
    """Beside adapters; not of a network that is published rounded."""
    options = ["--mixed_precision", "bf16", "--no-use_ema", "--use_8bit_adam", "--offload_text_encoder"]
    for ranks, advised in (([], False), (["--ta_lora_rank", 2], False), (LORA, True)):
        args = parsed(*tiny_args, *options, *ranks)
        fake = lambda args, *_: {"all": {"weights": 9 - 8 * (args.base_quantization != "none")}}  # noqa: E731
        monkeypatch.setattr(advice, "plan", fake)
        assert ("--base_quantization" in advice.what_would_help(args)) == advised
    models = models_of(args)
    assert {"int8", "nf4"} < {word for lever in advice.levers(args, models) for word in lever.words.split()}
    models.networks["transformer"].register_to_config(quantization_config={"load_in_4bit": True})
    assert not [lever for lever in advice.levers(args, models) if "quantization" in lever.words]


def test_a_base_that_comes_out_otherwise_is_not_resumed_on(tiny_args, tmp_path):
    command = [*tiny_args, *LORA, "--base_quantization", "int8", "--report_to", "none", "--validation_steps", 0]
    run([*command, "--max_train_steps", 2])
    manifest = next((tmp_path / "out" / "checkpoint-2").glob("loop-0.json"))
    state = json.loads(manifest.read_text())
    state["networks"][0]["base"]["sha256"] = "0" * len(state["networks"][0]["base"]["sha256"])
    manifest.write_text(json.dumps(state).ljust(manifest.stat().st_size)[: manifest.stat().st_size])
    with pytest.raises(Mistake, match="comes out otherwise"):
        run([*command, "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lora_rank", 2], "the teaching assistant would be trained in full: give --lora_rank"),
        ([], "the generator and the teaching assistant would be trained in full"),
    ],
)
def test_what_a_rounded_base_cannot_have(tiny_args, options, words):
    with pytest.raises(Mistake, match=words):
        run([*tiny_args, *options, "--base_quantization", "nf4", "--dry_run"])


def test_weights_that_are_no_safetensors_are_refused_before_anything_loads(tiny_args, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    folder = tmp_path / "model" / "transformer"
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), tmp_path / "generator.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(tmp_path / "generator.bin", folder / "diffusion_pytorch_model.bin")
    start = ["--no-share_base", "--timestep", 400, "--input_noise", "unit", "--pretrained_generator_name_or_path"]
    for options, words in (
        ([*start, tmp_path / "generator.bin"], "reads safetensors, but .*generator.bin is none: save it so"),
        ([*start, folder], "has only diffusion_pytorch_model.bin: save it so"),
        (["--pretrained_model_name_or_path", tmp_path / "model"], "model/transformer has only diffusion_pytorch_mo"),
    ):
        args = parsed(*tiny_args, *LORA, "--base_quantization", "int8", *options)
        models = models_of(args)
        with pytest.raises(Mistake, match=words):
            check_rounding(args, models, roles_of(args, models))


def test_fsdp_is_refused(tiny_args, monkeypatch):
    monkeypatch.setattr("diff_instruct.models.published.is_chosen", lambda: True)
    with pytest.raises(Mistake, match="FSDP2"):
        run([*tiny_args, *LORA, "--base_quantization", "int8", "--dry_run"])
