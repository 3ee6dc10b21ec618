"""Generators that start as adapters of the reference: at step 0 they are the stock pipeline with that LoRA, or with
the turbo's network as far as the rank goes."""

import re
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from diff_instruct.export.export import save_lora
from diff_instruct.export.kohya import kohya_lora
from diff_instruct.mistake import Mistake
from diff_instruct.models import actors as actors_module
from diff_instruct.models.actors import load_actors
from diff_instruct.models.adapter_start import low_rank, read_adapters, targets_with
from diff_instruct.models.loading import load_reference
from diff_instruct.models.lora import add_lora, merged, trained_parameters
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.models.starts import Lora
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import ATTENTION
from tests.families import FAMILY, save
from tests.runs import run, same, trained, turbo_of, weights
from tests.tiny import PROMPTS


NAMES = ["StableDiffusionXLPipeline", "FluxPipeline", "ZImagePipeline", "QwenImagePipeline"]


def write_lora(stock, family, folder, targets, rank=2):
    """A LoRA that does something, with α = 2 rank, as the stock pipeline saves one."""
    network = getattr(stock, family.denoiser)
    add_lora(network, "generator", rank, 2 * rank, targets)
    for p in trained_parameters(network, "generator").values():
        torch.nn.init.normal_(p, std=0.3)
    save_lora(folder, family, network)
    return folder


@pytest.fixture
def command(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")

    def words(reference, *more):
        words = ["--pretrained_model_name_or_path", reference, "--train_prompts", prompts, "--reward", "pocket"]
        return parse_args([str(w) for w in [*words, "--cfg_scale", 1, "--output_dir", tmp_path / "out", *more]])

    return words


@pytest.mark.parametrize("name, kind", [*((name, "none") for name in NAMES), ("FluxPipeline", "int8")])
def test_at_step_0_it_is_the_stock_pipeline_with_the_lora(command, tmp_path, name, kind):
    """Also where the LoRA is for layers that the family gives no adapters, and of a lower rank; and its TA is the
    reference. The merged weights are the stock's, whatever the base is rounded to."""
    family, folder = FAMILY[name], save(name, tmp_path / "reference")
    other = {"unet": "time_emb_proj", "transformer": "proj_out"}[family.denoiser] if name != "ZImagePipeline" else "w1"
    args = command(folder)
    stock = load_reference(models_of(args), torch.float32)
    lora = write_lora(stock, family, tmp_path / "lora", targets_with(ATTENTION[:2], [other]))
    start = ["--pretrained_generator_lora", f"{lora}:0.5", "--ta_lora_rank", 2, "--base_quantization", kind]
    args = command(folder, *start, "--lora_rank", 3)
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.float32, nullcontext, args)

    stock = load_reference(models, torch.float32)
    stock.load_lora_weights(lora)
    stock.fuse_lora(components=[family.denoiser], lora_scale=0.5)
    stock.unload_lora_weights()
    expected, plain = getattr(stock, family.denoiser).state_dict(), merged(actors.generator.network, "generator")
    assert expected.keys() == plain.keys()
    assert all(torch.allclose(plain[k](), v, atol=1e-5) for k, v in expected.items())
    if kind != "none":
        return
    z = torch.randn(1, *actors.pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        c = actors.pipe.encode_prompt(["a red apple"])
        ours = actors.generator.generate(z, c)
        theirs = actors.pipe.generate(getattr(stock, family.denoiser), z, c)
        plain = actors.ref.generate(z, c)
        assert torch.equal(plain, actors.ta.generate(z, c))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["alpha", "rslora", "patterns"])
def test_a_folder_that_peft_wrote(command, tmp_path, kind):
    """Its α is in its adapter_config.json alone, and so is where α or rank are others: the merged weights are peft's
    own. A LoRA rank below that of any of its layers is one line."""
    folder, targets = save("FluxPipeline", tmp_path / "reference"), ["attn.to_q", "attn.to_k"]
    options = {
        "alpha": {"r": 2, "lora_alpha": 8},
        "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
        "patterns": {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 9}},
    }[kind]
    network = load_reference(models_of(command(folder)), torch.float32).transformer
    theirs = get_peft_model(network, LoraConfig(target_modules=targets, init_lora_weights=False, **options))
    theirs.save_pretrained(tmp_path / "lora")
    assert "alpha" not in "".join(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    start = ["--pretrained_generator_lora", tmp_path / "lora", "--ta_lora_rank", 2, "--lora_rank"]
    rank = max(options["r"], 3 if kind == "patterns" else 0)
    args = command(folder, *start, rank)
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.float32, nullcontext, args)
    ours, expected = merged(actors.generator.network, "generator"), theirs.merge_and_unload().state_dict()
    plain = merged(actors.generator.network, "ta")
    assert all(torch.allclose(ours[k](), v, atol=1e-6) for k, v in expected.items())
    changed = [k for k, v in expected.items() if not torch.allclose(plain[k](), v, atol=1e-3)]
    assert len(changed) == 4  # queries and keys of two blocks
    with pytest.raises(
        Mistake, match=rf"--pretrained_generator_lora .*lora is of rank {rank}: give --lora_rank {rank}"
    ):
        models_of(command(folder, *start, rank - 1))


def test_kohyas_names_are_read_as_diffusers_own(command, tmp_path, monkeypatch):
    family, folder = FAMILY["StableDiffusionXLPipeline"], save("StableDiffusionXLPipeline", tmp_path / "reference")
    models = models_of(command(folder))
    lora = write_lora(load_reference(models, torch.float32), family, tmp_path / "lora", family.lora_targets)
    save_file(kohya_lora(lora / "pytorch_lora_weights.safetensors"), tmp_path / "kohya.safetensors")
    stock = load_reference(models, torch.float32)
    ours, kohyas = (read_adapters(Lora(str(p)), stock, "unet") for p in (lora, tmp_path / "kohya.safetensors"))
    assert ours.keys() == kohyas.keys() and ours
    for name, (a, b) in ours.items():
        torch.testing.assert_close(b @ a, kohyas[name][1] @ kohyas[name][0])
    args = command(folder, "--pretrained_generator_lora", tmp_path / "kohya.safetensors", "--lora_rank", 2)
    assert len(models_of(args).start_layers) == len(ours)
    asked = []
    download = lambda *repo_and_file, **_: asked.append(repo_and_file) or str(tmp_path / "kohya.safetensors")  # noqa: E731
    monkeypatch.setattr("diff_instruct.models.weight_files.hf_hub_download", download)
    args = command(folder, "--pretrained_generator_lora", "me/turbo/4_steps.safetensors:0.5", "--lora_rank", 2)
    assert models_of(args).start.scale == 0.5 and asked == [("me/turbo", "4_steps.safetensors")]
    with pytest.raises(Mistake, match="--pretrained_generator_lora: there is no file nowhere.safetensors"):
        models_of(command(folder, "--pretrained_generator_lora", "nowhere.safetensors", "--lora_rank", 2))
    with pytest.raises(Mistake, match="of rank 2: give --lora_rank 2 or more"):
        models_of(command(folder, "--pretrained_generator_lora", lora, "--lora_rank", 1))
    with pytest.raises(Mistake, match="--pretrained_generator_lora .* is not for the transformer of a FluxPipeline"):
        other = save("FluxPipeline", tmp_path / "flux")
        models_of(command(other, "--pretrained_generator_lora", lora, "--lora_rank", 2))


def energy(ours, theirs, keys):
    return sum((ours[k]().float() - theirs[k]).square().sum().item() for k in keys)


@pytest.mark.parametrize(
    "name, kind", [*((name, "none") for name in NAMES), ("FluxPipeline", "int8"), ("FluxPipeline", "nf4")]
)
def test_at_step_0_it_is_the_turbo_as_far_as_its_rank_goes(command, tmp_path, name, kind):
    """With all of the rank the merged network is the turbo, whatever the base is rounded to; with less of it, it is as
    far from it as is said; and its TA is the reference."""
    family, folder = FAMILY[name], save(name, tmp_path / "reference")
    stock = load_reference(models_of(command(folder)), torch.float32)
    base = getattr(stock, family.denoiser)
    turbo = turbo_of(base, tmp_path / "turbo").requires_grad_(False).eval()
    start = ["--pretrained_generator_name_or_path", tmp_path / "turbo", "--ta_lora_rank", 2]
    start += ["--base_quantization", kind] + ["--timestep", 400, "--input_noise", "unit"] * (not family.flow)

    def loaded(*more):
        args = command(folder, *start, *more)
        models = models_of(args)
        roles = roles_of(args, models)
        assert {role.base for role in roles} == {"ref"}
        return load_actors(models, roles, "cpu", torch.float32, nullcontext, args)

    actors, theirs = loaded("--lora_rank", 512, "--lora_target_modules", "all"), turbo.state_dict()
    ours = merged(actors.generator.network, "generator")
    layers = {f"{k}.weight" for k, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    rest = [k for k, v in base.state_dict().items() if k not in layers and not torch.equal(v, theirs[k])]
    assert all(torch.allclose(ours[k](), theirs[k], atol=1e-5) for k in layers)
    assert ("Not in it" in actors.start[-1]) == bool(rest) and "100.0% within" in actors.start[0]
    if kind == "none":
        turbo.load_state_dict(theirs | {k: base.state_dict()[k] for k in rest})
        z = torch.randn(1, *actors.pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            c = actors.pipe.encode_prompt(["a red apple"])
            picture, stocks = actors.generator.generate(z, c), actors.pipe.generate(turbo, z, c)
            plain = actors.ref.generate(z, c)
            assert torch.equal(plain, actors.ta.generate(z, c))
        torch.testing.assert_close(picture, stocks, rtol=1e-5, atol=1e-5 * stocks.abs().max().item())
        assert (picture - plain).abs().max() > 1e-3

    actors, theirs = loaded("--lora_rank", 2), turbo_of(base, tmp_path / "turbo").state_dict()
    missing = energy(merged(actors.generator.network, "generator"), theirs, theirs)
    share = 1 - missing / sum((v - theirs[k]).square().sum().item() for k, v in base.state_dict().items())
    assert float(re.search(r"it has ([\d.]+)% of the difference", actors.start[0])[1]) == pytest.approx(
        100 * share, abs=0.051
    )
    assert 0 < share < 0.9 and "(--lora_target_modules all gives them some)" in actors.start[1]


def test_a_run_from_a_turbo_on_one_base(tiny_args, tiny_model, tmp_path, monkeypatch):
    """A .bin file, on a rounded base: stopped and resumed, without a second decomposition, it ends with the same; the
    LoRA file is against the reference, start and training together, and the pipeline that of both."""
    stock = load_reference(models_of(parse_args(tiny_args)), torch.float32)
    torch.save(turbo_of(stock.transformer, tmp_path / "turbo").state_dict(), tmp_path / "turbo.bin")
    start = ["--pretrained_generator_name_or_path", tmp_path / "turbo.bin", "--timestep", 400, "--input_noise", "unit"]
    command = [*tiny_args, *start, "--lora_rank", 4, "--lora_alpha", 2, "--ta_lora_rank", 2]
    command += ["--base_quantization", "int8", "--report_to", "none"]
    run([*command, "--output_dir", tmp_path / "whole"])
    run([*command, "--output_dir", tmp_path / "part"])
    monkeypatch.setattr(actors_module, "begin", None)
    run([*command, "--output_dir", tmp_path / "part", "--resume_from_checkpoint", "checkpoint-2"])
    assert same(trained(tmp_path / "part", 4), trained(tmp_path / "whole", 4))

    base, found = weights(tiny_model), weights(tmp_path / "whole")
    turbo = load_file(tmp_path / "turbo" / "diffusion_pytorch_model.safetensors")
    stock = load_reference(models_of(parse_args(tiny_args)), torch.float32)
    adapters = load_file(tmp_path / "whole" / "checkpoint-4" / "generator.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    a, b = (adapters[f"average.{name}.lora_{x}.generator.weight"] for x in "AB")
    torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + b @ a / 2, rtol=0, atol=1e-6)
    apart = [(found[f"{name}.weight"] - other[f"{name}.weight"]).norm() for other in (turbo, base)]
    assert apart[0] < apart[1]


def test_whole_turbos_on_bases_of_their_own(command, tmp_path):
    folder = save("FluxPipeline", tmp_path / "reference")
    network = load_reference(models_of(command(folder)), torch.float32).transformer
    turbo = turbo_of(network, tmp_path / "turbo")
    args = command(
        folder, "--pretrained_generator_name_or_path", tmp_path / "turbo", "--lora_rank", 2, "--no-share_base"
    )
    models = models_of(args)
    roles = roles_of(args, models)
    actors = load_actors(models, roles, "cpu", torch.float32, nullcontext, args)
    plain = merged(actors.generator.network, "generator")
    assert roles[0].base == "generator" and not actors.start
    assert all(torch.equal(plain[k](), v) for k, v in turbo.state_dict().items())


@pytest.mark.parametrize("shape", [(24, 40), (320, 200)])
def test_the_closest_product_of_a_rank(shape):
    """Exactly the truncated decomposition; within 0.3% of what it keeps where it is made by random projections. Where
    there is less to keep, the rest of the adapters stays as it begins."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u * torch.arange(1, len(s) + 1) ** -0.25 @ v
    a, b = low_rank(matrix, 8)
    kept = 1 - (matrix - b @ a).square().sum() / matrix.square().sum()
    best = (torch.arange(1, 9) ** -0.5).sum() / (torch.arange(1, len(s) + 1) ** -0.5).sum()
    assert best * (0.99999 if len(s) < 32 else 0.997) < kept < best * 1.00001
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = low_rank(matrix[:, :3] @ torch.randn(3, shape[1]), 8)
    assert len(a) == 3 and b.shape == (shape[0], 3)
