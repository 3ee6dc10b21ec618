"""A generator that starts as a LoRA of the reference: at step 0 it is the stock pipeline with that LoRA."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from diff_instruct.export.export import save_lora
from diff_instruct.export.kohya import kohya_lora
from diff_instruct.mistake import Mistake
from diff_instruct.models.actors import load_actors
from diff_instruct.models.adapter_start import read_adapters, targets_with
from diff_instruct.models.loading import load_reference
from diff_instruct.models.lora import add_lora, merged, trained_parameters
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.models.starts import Lora
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import ATTENTION
from tests.families import FAMILY, save
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


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_at_step_0_it_is_the_stock_pipeline_with_the_lora(command, tmp_path, name, kind):
    """Also where the LoRA is for layers that the family gives no adapters, and of a lower rank; and its TA is the
    reference. The merged weights are the stock's, whatever the base is rounded to."""
    if kind == "int8" and name != "FluxPipeline":
        pytest.skip("one family on a rounded base suffices")
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


def test_kohyas_names_are_read_as_diffusers_own(command, tmp_path):
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
    with pytest.raises(Mistake, match="of rank 2: give --lora_rank 2 or more"):
        models_of(command(folder, "--pretrained_generator_lora", lora, "--lora_rank", 1))
    with pytest.raises(Mistake, match="--pretrained_generator_lora .* is not for the transformer of a FluxPipeline"):
        other = save("FluxPipeline", tmp_path / "flux")
        models_of(command(other, "--pretrained_generator_lora", lora, "--lora_rank", 2))
