"""A rounded base: its layers against the weights that they stand for, what is rounded, and files against networks."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from diff_instruct.families import FAMILIES
from diff_instruct.mistake import Mistake
from diff_instruct.models import rounding as rounding_module
from diff_instruct.models.configs import ModelSource
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.lora import acting, add_lora, lora_layers, merged, trained_parameters
from diff_instruct.models.published import (
    STATE,
    Published,
    as_published,
    is_published_rounded,
    load_rounded,
    plan_of,
    shards,
)
from diff_instruct.models.rounding import (
    ENCODE,
    PARTS,
    Rounded,
    empty_parts,
    encode_nf4,
    nf4_parts,
    round_empty,
    rounded_layers,
    rounding,
    stored_bytes,
)
from diff_instruct.models.sources import read_models
from diff_instruct.models.tensors import save_network
from tests.families import BUILD as PIPELINES
from tests.families import FAMILY


PIXART = FAMILIES["PixArtAlphaPipeline"]
KINDS = {"int8": 0.01, "nf4": 0.1}  # the most that rounding may change a weight, relative
SHAPES = [(256, 240), (128, 96), (3, 64)]  # 240 and 96 are no multiples of a block


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rounded_layer_is_one_with_the_weight_that_it_stands_for(kind, shape):
    """Output and gradient, in float32 and bfloat16; the graph holds nothing but the codes."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    layer = Rounded(linear, kind, ENCODE[kind](linear.weight.data))
    assert 0 < relative(layer.decode(), linear.weight) < KINDS[kind]
    meant = {name: (part.shape, part.dtype) for name, part in empty_parts(kind, shape).items()}
    assert {name: (getattr(layer, name).shape, getattr(layer, name).dtype) for name in PARTS[kind]} == meant
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, saved = torch.randn(2, 5, shape[1], dtype=dtype, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            output = layer(x)
        assert output.dtype == dtype and sum(t.numel() for t in saved if t.is_floating_point()) < x.numel() + 512
        expected = nn.functional.linear(x, layer.decode(dtype), linear.bias.to(dtype))
        towards = torch.randn_like(output)
        for a, b in zip((output, *torch.autograd.grad(output, x, towards)),
                        (expected, *torch.autograd.grad(expected, x, towards))):  # fmt: skip
            assert relative(a, b) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, shape[1])).dtype == torch.bfloat16
    before = layer.decode()
    assert torch.equal(layer.to(torch.bfloat16).decode(), before) and layer.bias.dtype == torch.bfloat16


def test_nf4_in_groups_of_rows_is_that_of_bitsandbytes(monkeypatch):
    weight = torch.randn(1000, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = nf4_parts(*quantize_4bit(weight.flatten(), blocksize=64, compress_statistics=True, quant_type="nf4"))
    monkeypatch.setattr(rounding_module, "CHUNK", 2**15)
    found = encode_nf4(weight)
    assert all(torch.equal(found[name], part) for name, part in expected.items())


def saved_network(network, folder):
    """(folder, [`Published`]) of a network."""
    network.save_pretrained(folder, max_shard_size="40KB")
    return Published(shards(ModelSource(str(folder)), ""))


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_are_read_as_from_pretrained_reads_them(name, tmp_path):
    """Nothing rounded: every parameter and buffer and its dtype, for each family. And what would be rounded."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    family = FAMILY[name]
    network = getattr(pipe, family.denoiser)
    published = saved_network(network, tmp_path)
    ours = load_rounded(network, {}, published, torch.bfloat16)
    theirs = type(network).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for own, expected in ((ours.named_parameters(), theirs.named_parameters()),
                          (ours.named_buffers(), theirs.named_buffers())):  # fmt: skip
        own, expected = dict(own), dict(expected)
        assert own.keys() == expected.keys()
        assert all(own[k].dtype == v.dtype and torch.equal(own[k], v) for k, v in expected.items())
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())

    plans = {kind: rounding(family, network, kind) for kind in KINDS}
    assert plans["int8"].keys() == plans["nf4"].keys() and set(plans["int8"].values()) == {"int8"}
    assert "nf4" in plans["nf4"].values()
    first_and_last = [n for n, m in network.named_children() if isinstance(m, nn.Linear)]
    assert not plans["nf4"].keys() & set(first_and_last)
    ends = family.lora_targets
    adapted = (lambda n: re.fullmatch(ends, n)) if isinstance(ends, str) else (lambda n: n.endswith(ends))
    targets = [n for n, m in network.named_modules() if adapted(n) and type(m) is nn.Linear]
    inside = [n for n in targets if n in plans["nf4"]]
    assert len(inside) >= len(targets) / 2 > 0  # what is large enough for adapters is rounded


def test_what_modulates_has_8_bits_under_nf4():
    network = PIPELINES["FluxPipeline"]().transformer
    plan = rounding(FAMILIES["FluxPipeline"], network, "nf4")
    assert plan["transformer_blocks.0.norm1.linear"] == plan["single_transformer_blocks.0.norm.linear"] == "int8"
    assert plan["single_transformer_blocks.0.proj_out"] == plan["transformer_blocks.0.attn.to_q"] == "nf4"
    assert not {"proj_out", "x_embedder", "norm_out.linear"} & plan.keys()

    class Careful(FAMILIES["FluxPipeline"]):
        unrounded = ("to_q",)

    left = plan.keys() - rounding(Careful, network, "nf4").keys()
    assert left == {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"}


@pytest.fixture
def base(tiny_model):
    """(published weights, a rounded base with adapters that do something)."""
    source = ModelSource(tiny_model)
    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    published = Published(shards(source, "transformer"))
    rounded = load_rounded(network, rounding(PIXART, network, "nf4"), published, torch.float32)
    for name in ("ta", "generator"):
        add_lora(rounded, name, 2, 4, PIXART.lora_targets)
        for p in trained_parameters(rounded, name).values():
            torch.nn.init.normal_(p, std=0.3)
    return network, rounded


def output(network, x):
    c = {"encoder_hidden_states": torch.ones(1, 3, 16), "encoder_attention_mask": torch.ones(1, 3)}
    conditions = {"resolution": None, "aspect_ratio": None}
    return network(x, timestep=torch.tensor([100]), added_cond_kwargs=conditions, **c)[0]


def test_an_export_merges_into_what_is_published(base, tmp_path):
    """Its float32 weights are the published ones and the adapters'; what draws with `as_published` draws the same."""
    network, rounded = base
    save_network(rounded, tmp_path, merged(rounded, "generator"))
    found, x = load_file(tmp_path / "diffusion_pytorch_model.safetensors"), torch.randn(1, 4, 8, 8)
    expected = network.state_dict()
    for name, layer in rounded.named_modules():
        if layer in lora_layers(rounded):
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + layer.get_delta_weight("generator")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    network.load_state_dict(found)
    with torch.no_grad(), acting(lora_layers(rounded), "generator"):
        judged = output(rounded, x)
        with as_published(rounded):
            torch.testing.assert_close(output(rounded, x), output(network, x), rtol=1e-4, atol=1e-4)
        assert relative(judged, output(network, x)) > 1e-3  # so there is something to report
        assert torch.equal(judged, output(rounded, x))


def test_a_base_published_in_nf4_is_taken_as_it_is(tiny_model, tmp_path):
    """As bitsandbytes' layers are saved: the same codes, and a merge into what they stand for."""
    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    state = network.state_dict()
    for name in rounding(PIXART, network, "int8"):
        codes, how = quantize_4bit(state[f"{name}.weight"], compress_statistics=True, quant_type="nf4")
        state[f"{name}.weight"] = codes
        state |= {f"{name}.weight.{k}": v for k, v in how.as_dict(packed=True).items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    published = Published(shards(ModelSource(str(tmp_path)), ""))
    plan = plan_of(published, network)
    assert set(plan.values()) == {"nf4"} and plan.keys() == rounding(PIXART, network, "int8").keys()
    taken = load_rounded(network, plan, published, torch.float32)
    name = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(taken.get_submodule(name).weight, state[f"{name}.weight"].flatten())
    merged_weights = {k: make() for k, make in merged(taken, "generator").items()}
    assert merged_weights.keys() == network.state_dict().keys()
    assert torch.equal(merged_weights[f"{name}.weight"], taken.get_submodule(name).decode())
    assert relative(merged_weights[f"{name}.weight"], network.get_parameter(f"{name}.weight")) < 0.1
    assert f"{name}.weight.{STATE}" in published
    assert is_published_rounded({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(Path(tiny_model) / "vae", tmp_path / "model" / "vae", dirs_exist_ok=True)
    shutil.copy(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "model" / "transformer")
    config = tmp_path / "model" / "transformer" / "config.json"
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": [
        name for name, m in network.named_modules() if isinstance(m, nn.Linear) and name not in plan]}  # fmt: skip
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": how}))
    models = read_models(ModelSource(str(tmp_path / "model")))
    pipe = load_generator(models, load_reference(models, torch.float32))  # as it is evaluated and shown: not rounded
    assert "quantization_config" not in pipe.transformer.config
    assert all(torch.equal(merged_weights[k], v) for k, v in pipe.transformer.state_dict().items())
    with pytest.raises(Mistake, match="gguf"):
        is_published_rounded({"quantization_config": {"quant_method": "gguf"}})


def test_the_digest_tells_other_weights(tiny_model, tmp_path):
    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    plan, digests = rounding(PIXART, network, "int8"), []
    for i in range(3):
        folder = tmp_path / str(i)
        if i == 2:
            network.transformer_blocks[0].attn1.to_q.weight.data *= 1.1
        digests.append(load_rounded(network, plan, saved_network(network, folder), torch.float32).digest["sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_files_that_lack_a_weight_or_are_none(tiny_model, tmp_path):
    network = PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    with pytest.raises(Mistake, match="has none"):
        shards(ModelSource(str(tmp_path)), "transformer")
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(Mistake, match="have no adaln_single"):
        load_rounded(network, {}, Published(shards(ModelSource(str(tmp_path)), "")), torch.float32)


def test_stored_bytes_are_those_of_the_tensors():
    config = dict(PIPELINES["FluxPipeline"]().transformer.config)
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(config)
    plan = rounding(FAMILIES["FluxPipeline"], network, "nf4")
    plain = sum(p.numel() for p in network.parameters())
    assert stored_bytes(network, 2) == 2 * plain
    round_empty(network, plan)
    assert len(rounded_layers(network)) == len(plan)
    assert stored_bytes(network, 2) < 2 * plain
    assert json.dumps(plan)
