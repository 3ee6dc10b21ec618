"""A transformer's files for other programs: original names, float8, GGUF, LoRA; read back by diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from diffusers.loaders import single_file_utils
from diffusers.models.modeling_utils import load_state_dict
from safetensors.torch import load_file

import export_for_apps as script
from diff_instruct.export import apps
from diff_instruct.export.export import save_lora
from diff_instruct.export.original import original_layout
from diff_instruct.export.rounded import is_rounded
from diff_instruct.families import FAMILIES
from diff_instruct.mistake import Mistake
from diff_instruct.models.lora import add_lora, merged
from pipeline_one_step import OneStepPipeline
from tests.families import BUILD, FAMILY, SIDES, save
from tests.tiny import PROMPTS


ARCHITECTURES = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures"
CONVERT = {  # diffusers' converters of what is published in the original layout
    "FluxPipeline": ("FLUX.1-dev", "convert_flux_transformer_checkpoint_to_diffusers"),
    "StableDiffusion3Pipeline": ("stable-diffusion-3.5-medium", "convert_sd3_transformer_checkpoint_to_diffusers"),
    "Flux2Pipeline": ("FLUX.2-dev", "convert_flux2_transformer_checkpoint_to_diffusers"),
    "Krea2Pipeline": ("Krea-2-Raw", "convert_krea2_transformer_checkpoint_to_diffusers"),
    "ZImagePipeline": ("Z-Image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    "ChromaPipeline": ("Chroma1-HD", "convert_chroma_transformer_checkpoint_to_diffusers"),
    "ErnieImagePipeline": ("ERNIE-Image", "convert_ernie_image_transformer_checkpoint_to_diffusers"),
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel", "convert_auraflow_transformer_checkpoint_to_diffusers"),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", "convert_lumina2_to_diffusers"),
}
NETWORKS = [name for name in BUILD if (FAMILY[name].apps or {}).get("original") is not None]
WITH_LORA = [
    n for n in NETWORKS if FAMILY[n].has_lora_files() and not FAMILY[n].apps.get("original_lora") and n != "schnell"
]
ORIGINAL_LORA = [name for name in NETWORKS if FAMILY[name].apps.get("original_lora")]
GGUF = [name for name in NETWORKS if FAMILY[name].apps.get("architecture")]


@pytest.mark.parametrize("name", CONVERT)
def test_original_names_at_full_size(name):
    """diffusers' converter makes every weight of the published architecture again, row by row: of each, one column of
    numbers that no other row has."""
    folder, converter = CONVERT[name]
    family = FAMILIES[name]
    config = ARCHITECTURES / folder / "transformer"
    with init_empty_weights():
        if config.is_dir():
            network = getattr(diffusers, json.loads((config / "config.json").read_text())["_class_name"])
            network = network.from_config(network.load_config(config))
        else:  # the class's defaults are the published model
            network = getattr(diffusers, folder)()
    state, start = {}, 0
    for key, weight in network.state_dict().items():
        rows = weight.shape[0] if weight.ndim else 1
        state[key] = torch.arange(start, start + rows).view(-1, *[1] * (weight.ndim - 1))
        start += rows
    network.state_dict = lambda: state
    written = {key: part() for key, part in original_layout(network, family.apps["original"]).items()}
    back = getattr(single_file_utils, converter)(dict(written))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key].view(state[key].shape), state[key]) for key in state)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(pipeline, folder of the export, folder of its files) of a family, as the script writes them, rounded, too."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            stock = (
                FAMILY[name]
                .stock()
                .from_pretrained(save(name, folder / "stock"), **dict.fromkeys(FAMILY[name].unused))
            )
            stock.to(torch.bfloat16).to(torch.float32)  # what is written is not rounded once more
            pipe = OneStepPipeline.from_pipe(stock)
            pipe.save_pretrained(folder / "apples")
            kinds = ["network", "workflow", "diffusers", "fp8"]
            kinds += ["gguf", "--gguf", "q8_0", "q4_0"] if name in GGUF else []
            words = [str(folder / "apples"), str(folder / "files"), "--write", *kinds]
            script.main(script.build_parser().parse_args(words))
            made[name] = pipe, folder / "apples", folder / "files"
        return made[name]

    return make


def draw(pipe):
    side = max(side for name, side in SIDES.items() if FAMILY[name].name == pipe.config.family)
    z = torch.randn(2, *pipe.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    return pipe(PROMPTS[:2], latents=z, height=side, width=side, output_type="pt").images


def back_again(pipe, state):
    """A state in the original layout by diffusers' names, by our own table read backwards."""
    back = {}
    for original, part in original_layout(pipe.transformer, pipe.family.apps["original"]).items():
        value = state[original]
        value = torch.cat(value.chunk(2)[::-1]) if part.swapped else value
        value = value.view(next(iter(part.weights.values())).shape) if part.flat else value
        rows = [len(weight) for weight in part.weights.values()] if len(part.weights) > 1 else [len(value)]
        for key, weight in zip(part.weights, value.split(rows)):
            back.setdefault(key, {})[part.part[0]] = weight
    return {key: torch.cat([parts[i] for i in sorted(parts)]) for key, parts in back.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_the_network(exports, name):
    pipe, _, files = exports(name)
    back = back_again(pipe, load_file(files / "apples_1step_transformer.safetensors"))
    for key, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(back[key].float(), value)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stock_layout_draws_as_the_page_says(exports, name):
    pipe, _, files = exports(name)
    stock = DiffusionPipeline.from_pretrained(
        files / "apples_1step_diffusers", dtype=torch.float32, **dict.fromkeys(pipe.family.unused)
    )
    images = draw(pipe)
    side, arguments = images.shape[-1], pipe.family.stock_arguments(pipe)
    z = torch.randn(2, *pipe.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    call = {"latents": pipe.family.stock_latents(z), "height": side, "width": side, "output_type": "pt"}
    torch.testing.assert_close(stock(prompt=PROMPTS[:2], **arguments, **call).images, images, atol=1e-4, rtol=0)
    said = f"`sigmas={arguments['sigmas']}`" if "sigmas" in arguments else "`num_inference_steps=1`"
    assert said in (files / "apples_1step_apps.md").read_text()


@pytest.mark.parametrize("name", NETWORKS)
def test_fp8_times_its_scales_is_near_the_network(exports, name):
    """Within 1/16 of each number (three bits of mantissa) or of the smallest step."""
    pipe, _, files = exports(name)
    state = load_file(files / "apples_1step_transformer_fp8.safetensors")
    assert state.pop("scaled_fp8").dtype == torch.float8_e4m3fn
    scales = {key.removesuffix("scale_weight"): state.pop(key) for key in list(state) if key.endswith("scale_weight")}
    layout = original_layout(pipe.transformer, pipe.family.apps["original"])
    assert scales.keys() == {key.removesuffix("weight") for key, part in layout.items() if is_rounded(part)}
    assert all(state[f"{key}weight"].dtype == torch.float8_e4m3fn for key in scales)
    for key, scale in scales.items():
        state[f"{key}weight"] = state[f"{key}weight"].float() * scale
    for key, value in back_again(pipe, state).items():
        torch.testing.assert_close(
            value.float(), pipe.transformer.state_dict()[key].float(), rtol=1 / 16, atol=0.01 * 0.1
        )


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", GGUF)
def test_gguf_read_back_by_diffusers(exports, name, kind):
    """Names, shapes and types are what diffusers' loader reads; near the network by the type's own error."""
    import gguf

    pipe, _, files = exports(name)
    file = files / f"apples_1step_transformer_{kind}.gguf"
    reader = gguf.GGUFReader(file)
    field = reader.fields["general.architecture"]
    assert bytes(field.parts[field.data[0]]).decode() == pipe.family.apps["architecture"]
    state = {}
    for key, tensor in load_state_dict(str(file)).items():
        data = tensor.as_tensor() if hasattr(tensor, "quant_type") else tensor
        values = gguf.quants.dequantize(np.asarray(data), tensor.quant_type) if hasattr(tensor, "quant_type") else data
        state[key] = torch.as_tensor(np.asarray(values))
    own = pipe.transformer.state_dict()
    types = {tensor.tensor_type.name.lower() for tensor in reader.tensors}
    layout = original_layout(pipe.transformer, pipe.family.apps["original"])
    assert (kind in types) == any(is_rounded(part, 32) for part in layout.values())  # some have 16 numbers a row
    assert types <= {kind, "q8_0", "f32"}
    for key, value in back_again(pipe, state).items():
        error = (value - own[key]).norm() / own[key].norm()
        assert error < {"q8_0": 0.01, "q4_0": 0.12}[kind], key


@pytest.mark.parametrize("name", ["QwenImagePipeline", "ZImagePipeline"])
def test_gguf_network_draws(exports, name):
    """Loaded by `from_single_file`, in an export's place: near the export's pictures, and the stock's own."""
    pipe, export, files = exports(name)
    file = str(files / "apples_1step_transformer_q8_0.gguf")
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    where = {"config": str(export), "subfolder": "transformer", "quantization_config": config}
    network = type(pipe.transformer).from_single_file(file, torch_dtype=torch.float32, **where)
    assert any(p.dtype == torch.uint8 for p in network.parameters())
    quantised = OneStepPipeline.from_pretrained(export, transformer=network)
    images = draw(quantised)
    assert (images - draw(pipe)).abs().mean() < 0.05
    scope, side = {"pipe": quantised}, images.shape[-1]
    exec(pipe.family.stock_setup(), scope)  # as the card has it: `from_pipe` casts, which bytes refuse
    stock = scope["stock"]
    z = torch.randn(2, *pipe.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    latents = {"latents": pipe.family.stock_latents(z), "height": side, "width": side, "output_type": "pt"}
    stock = stock(prompt=PROMPTS[:2], **pipe.family.stock_arguments(pipe), **latents).images
    torch.testing.assert_close(stock, images, atol=1e-4, rtol=0)


def adapted(pipe):
    """The network with a LoRA of rank 2, alpha 6, and the network with that merged."""
    network = type(pipe.transformer).from_config(pipe.transformer.config)
    network.load_state_dict(pipe.transformer.state_dict())
    add_lora(network, "generator", 2, 6, pipe.family.lora_targets)
    for key, p in network.named_parameters():
        if "lora_" in key:
            std = 0.4 if pipe.config.family == "ErnieImagePipeline" else 0.1  # whose tiny network hears less of it
            torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(len(key)))
    plain = type(network).from_config(network.config)
    plain.load_state_dict({k: make() for k, make in merged(network, "generator").items()})
    return network, plain


@pytest.mark.parametrize("name", ORIGINAL_LORA)
def test_lora_by_original_names(exports, name, tmp_path):
    """Weight + B A is the merged network's weight, in the original layout."""
    pipe, _, _ = exports(name)
    network, plain = adapted(pipe)
    save_lora(tmp_path, pipe.family, network)
    script.write(pipe, tmp_path, tmp_path, "apples", ["lora"], "fire")
    state = load_file(tmp_path / "apples_lora.safetensors")
    before, after = (original_layout(n, pipe.family.apps["original"]) for n in (pipe.transformer, plain))
    for key, part in before.items():
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        a, b = (state.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
        assert (a is not None) == (not torch.equal(part(), after[key]()))
        if a is not None:
            torch.testing.assert_close(part() + b.float() @ a.float(), after[key](), atol=2e-3, rtol=0)
    assert not state


@pytest.mark.parametrize("name", [name for name in NETWORKS if name in WITH_LORA])
def test_lora_at_its_strength(exports, name, tmp_path):
    """Rank 2, alpha 6: the merged network's pictures from the file alone, which has neither alpha nor metadata."""
    pipe, export, _ = exports(name)
    network, plain = adapted(pipe)
    expected = draw(OneStepPipeline.from_pipe(pipe, transformer=plain))
    (tmp_path / "apples").mkdir()
    save_lora(tmp_path / "apples", pipe.family, network)
    loaded = OneStepPipeline.from_pretrained(export)
    script.write(loaded, tmp_path / "apples", tmp_path, "apples", ["lora"], "fire")
    state = load_file(tmp_path / "apples_lora.safetensors")
    assert not any(key.endswith("alpha") for key in state)
    before = draw(loaded)
    loaded.load_lora_weights(tmp_path, weight_name="apples_lora.safetensors")
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(draw(loaded), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_workflow(exports, name):
    """Core nodes, all linked; one evaluation at σ = 1 from the program's own noise."""
    pipe, _, files = exports(name)
    graph = json.loads((files / "apples_1step_workflow.json").read_text())
    for node in graph.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert nodes["ManualSigmas"]["sigmas"] == "1, 0" and nodes["SamplerCustom"]["add_noise"]
    assert nodes["KSamplerSelect"]["sampler_name"] == "lcm" and nodes["SamplerCustom"]["cfg"] == 1.0
    assert ("FluxGuidance" in nodes) == (pipe.config.embedded_guidance is not None)
    if "stable_diffusion_cpp" in pipe.family.apps:
        assert "--diffusion-model" in apps.stable_diffusion_cpp(pipe, "apples_1step", "fire")
    else:
        with pytest.raises(Mistake, match="does not draw"):
            apps.stable_diffusion_cpp(pipe, "apples_1step", "fire")
