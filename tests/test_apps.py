"""An export in other programs' files and numbers draws the export's pictures."""

import json
import math
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import export_for_apps as script
from diff_instruct.export import apps, card
from diff_instruct.export.card import stock_call
from diff_instruct.export.export import save_lora
from diff_instruct.export.layouts import unet_names, vae_names
from diff_instruct.export.stock import stock_pipeline
from diff_instruct.mistake import Mistake
from diff_instruct.models.lora import add_lora, merged
from pipeline_one_step import Family, OneStepPipeline, Schedule
from tests.runs import run
from tests.tiny import PROMPTS, tiny_clip, tiny_pixart, tiny_sd, tiny_sd2, tiny_unet, tiny_vae


ROOT = Path(__file__).resolve().parents[1]
STEPS = {1: 625, 2: [999, 499], 4: [999, 749, 499, 249]}
SDXL_STEPS = {1: 399, 2: [399, 199], 4: [999, 749, 499, 249]}
EXPORTS = {"pixart": PixArtAlphaPipeline, "sd": StableDiffusionPipeline, "sd2": StableDiffusionPipeline}
EXPORTS["sdxl"] = StableDiffusionXLPipeline


def tiny_sdxl(folder):
    """As in `tiny`, but with text encoders of two widths: by them a single file's are told apart."""
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    config = CLIPTextConfig(**{**text_encoder.config.to_dict(), "hidden_size": 32, "projection_dim": 24})
    unet = tiny_unet(
        cross_attention_dim=48, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    StableDiffusionXLPipeline(
        tiny_vae().eval(), text_encoder, CLIPTextModelWithProjection(config).eval(), tokenizer, tokenizer, unet,
        scheduler,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


MAKE = {"pixart": tiny_pixart, "sd": tiny_sd, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    """Family to the folder of its tiny stock pipeline."""
    return {family: make(tmp_path_factory.mktemp(family)) for family, make in MAKE.items()}


@pytest.fixture
def one_step(stocks):
    """The `OneStepPipeline` around the tiny stock pipeline of a family."""

    def make(family, timestep=None, **options):
        stock = EXPORTS[family].from_pretrained(stocks[family])
        parts = {k: v for k, v in stock.components.items() if k in OneStepPipeline._optional_components or k == "vae"}
        scheduler = DDPMScheduler.from_config(stock.scheduler.config, clip_sample=False)
        timestep = timestep or {"pixart": 400, "sdxl": 399}.get(family, 625)
        parts = {**dict.fromkeys(OneStepPipeline._optional_components), **parts}
        pipe = OneStepPipeline(
            **parts, scheduler=scheduler, timestep=timestep, family=EXPORTS[family].__name__, **options
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def export(pipe, folder, *options):
    """Save the pipeline as `apples` and call the script on it; returns the folder of what it wrote."""
    pipe.save_pretrained(folder / "apples")
    script.main(script.build_parser().parse_args([str(folder / "apples"), str(folder / "files"), *options]))
    return folder / "files"


def noise(n=1, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(stock, timesteps, **call):
    """Pictures of a stock pipeline with the steps of an export."""
    stock.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.0, "output_type": "pt", "timesteps": timesteps, "height": 16, "width": 16}
    if isinstance(stock, PixArtAlphaPipeline):
        options.update(use_resolution_binning=False, clean_caption=False)
    return stock(num_inference_steps=len(timesteps), **options, **call).images.float()


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl"])
def test_from_single_file_draws_the_export_s_picture(one_step, tmp_path, family):
    """What is written, in float16, read back by diffusers alone: within 1e-3 of the stock pipeline in float16."""
    pipe, z = one_step(family), noise(len(PROMPTS))
    files = export(pipe, tmp_path, "--write", "single_file", "diffusers")
    config = files / "apples_1step_diffusers"
    cls, half = EXPORTS[family], torch.float16
    read = cls.from_single_file(files / "apples_1step.safetensors", config=str(config), torch_dtype=half)
    read.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    stock = cls.from_pretrained(config, dtype=half)
    images = [draw(p, pipe.timesteps, prompt=PROMPTS, latents=z.half()) for p in (read, stock)]
    torch.testing.assert_close(images[0], images[1], atol=1e-3, rtol=0)
    exported = pipe.to(dtype=half)(PROMPTS, latents=z.half(), output_type="pt").images.float()
    torch.testing.assert_close(images[0], exported, atol=1e-2, rtol=0)  # its steps are float32, the stock's float16
    assert exported.std() > 0.03


@pytest.mark.parametrize("family, upcast, told", [("sdxl", True, True), ("sdxl", False, False), ("sd", True, False)])
def test_a_vae_that_may_overflow_in_float16_is_told(one_step, tmp_path, family, upcast, told):
    """SDXL's own draws black pictures in float16; one that was made for it says so in its config."""
    pipe = one_step(family)
    pipe.vae.register_to_config(force_upcast=upcast)
    page = (export(pipe, tmp_path, "--write", "single_file") / "apples_1step_apps.md").read_text()
    assert ("the picture is then black" in page) == told


def test_open_clip_layout_of_stable_diffusion_2(one_step, tmp_path):
    """A UNet as wide as Stable Diffusion 2's makes the text encoder be written as OpenCLIP's."""
    pipe = one_step("sd")
    config = CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), "hidden_size": 1024, "num_attention_heads": 16})
    encoder = type(pipe.text_encoder)(config).eval()
    pipe.register_modules(unet=tiny_unet(cross_attention_dim=1024), text_encoder=encoder)
    files = export(pipe, tmp_path, "--write", "single_file", "diffusers")
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in load_file(
        files / "apples_1step.safetensors"
    )
    config = str(files / "apples_1step_diffusers")
    read = StableDiffusionPipeline.from_single_file(files / "apples_1step.safetensors", config=config)
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(read.text_encoder.state_dict()[key], value.half().float())


def test_the_network_alone_loads_and_is_the_same(one_step, tmp_path):
    pipe = one_step("sd")
    files = export(pipe, tmp_path, "--write", "network", "diffusers")
    unet = type(pipe.unet).from_single_file(
        files / "apples_1step_unet.safetensors", config=str(files / "apples_1step_diffusers"), subfolder="unet"
    )
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(value.float(), pipe.unet.state_dict()[key].half().float())


@pytest.mark.parametrize("architecture", ["stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"])
def test_names_at_full_size(architecture):
    """Every weight of the published architectures has a name of its own, and the telling ones are as published."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder, networks = str(ROOT / "benchmarks" / "architectures" / architecture), []
    for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        with init_empty_weights():
            networks.append(cls.from_config(cls.load_config(folder, subfolder=part)))
    unet, vae = networks
    for network, names in ((unet, unet_names(unet)), (vae, vae_names(vae))):
        written = [names[key] for key in network.state_dict()]
        assert len(set(written)) == len(written)
    names = unet_names(unet)
    first_upsampler = "output_blocks.2.2.conv.weight" if "xl" in architecture else "output_blocks.2.1.conv.weight"
    assert names["up_blocks.0.upsamplers.0.conv.weight"] == first_upsampler
    assert names["down_blocks.0.downsamplers.0.conv.weight"] == "input_blocks.3.0.op.weight"
    assert names["mid_block.resnets.1.conv2.bias"] == "middle_block.2.out_layers.3.bias"
    assert vae_names(vae)["decoder.up_blocks.0.resnets.2.conv1.weight"] == "decoder.up.3.block.2.conv1.weight"
    assert vae_names(vae)["encoder.mid_block.attentions.0.to_q.weight"] == "encoder.mid.attn_1.q.weight"


@pytest.mark.parametrize("alpha", [2, 6])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kohya_lora_draws_what_was_trained(one_step, tmp_path, family, alpha):
    """Rank 2 with its own alpha, loaded by the stock pipeline: the picture of the merged network."""
    pipe, z = one_step(family), noise(2)
    stock = stock_pipeline(pipe)
    plain = draw(stock, pipe.timesteps, prompt=PROMPTS[:2], latents=z)
    network = type(pipe.unet).from_config(pipe.unet.config)
    network.load_state_dict(pipe.unet.state_dict())
    add_lora(network, "generator", 2, alpha, pipe.family.lora_targets)
    for name, p in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    plain_network = type(network).from_config(network.config)
    plain_network.load_state_dict({k: make() for k, make in merged(network, "generator").items()})
    pipe.register_modules(unet=plain_network)
    (tmp_path / "apples").mkdir()
    save_lora(tmp_path / "apples", pipe.family, network)
    files = export(pipe, tmp_path, "--write", "lora")
    state = load_file(files / "apples_1step_lora.safetensors")
    assert all(key.startswith("lora_unet_") for key in state)
    assert {float(v) for k, v in state.items() if k.endswith(".alpha")} == {float(alpha)}
    stock.load_lora_weights(files, weight_name="apples_1step_lora.safetensors")
    with_lora = draw(stock, pipe.timesteps, prompt=PROMPTS[:2], latents=z)
    expected = pipe(PROMPTS[:2], latents=z, output_type="pt").images
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(with_lora, expected, atol=1e-3, rtol=0)  # the file is float16


def comfyui(graph, network, z, further, betas, flow=False):
    """What ComfyUI computes, in float64, for a workflow of ours: the network's inputs (x_t, t), and x0.

    Its formulas, `comfy/model_sampling.py` and `k_diffusion/sampling.py`: noise σ z (σ z + (1 − σ) latent in flow
    matching), input x / √(1 + σ²) at the timestep whose log σ is nearest, x̂0 = x − σ output (v prediction:
    x / (1 + σ²) − σ output / √(1 + σ²)), then x̂0 + σ' ε.
    """
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}

    def follow(link):
        return graph[link[0]]["inputs"]

    def numbers(link):
        text = follow(link)["sigmas"]
        return [float(n) for n in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]

    table = ((1 - (1 - betas).cumprod(0)) / (1 - betas).cumprod(0)).sqrt()
    sampler = by_class["SamplerCustom"]
    sigmas, inputs = numbers(sampler["sigmas"]), []
    if flow:
        assert sampler["add_noise"]
        x = sigmas[0] * z
    else:
        assert not sampler["add_noise"]
        first, last = numbers(follow(sampler["latent_image"])["sigmas"])
        x = abs(first - last) * z
    prediction = by_class.get("ModelSamplingDiscrete", {}).get("sampling", "eps")
    for i, sigma in enumerate(sigmas[:-1]):
        if flow:
            x_t, t = x, round(1000 * sigma)
        else:
            x_t, t = x / math.sqrt(1 + sigma**2), int((math.log(sigma) - table.log()).abs().argmin())
        inputs.append((x_t, t))
        output = network(x_t, t)
        if prediction == "v_prediction":
            x = x / (1 + sigma**2) - output * sigma / math.sqrt(1 + sigma**2)
        else:
            x = x - sigma * output
        if sigmas[i + 1] > 0:
            x = (1 - sigmas[i + 1] if flow else 1) * x + sigmas[i + 1] * further[i]
    return inputs, x


@pytest.mark.parametrize("input_noise", ["unit", "scaled"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("family", EXPORTS)
def test_comfyui_s_formulas_give_the_export_s_x_t(one_step, monkeypatch, family, n, input_noise):
    """With the workflow's numbers the network is given the export's x_t, within 1e-6, at the export's timesteps."""
    timestep = {"sdxl": SDXL_STEPS, "pixart": {**STEPS, 1: 400}}.get(family, STEPS)[n]
    pipe, z = one_step(family, timestep, input_noise=input_noise), noise().double()
    further = [noise(seed=i).double() for i in range(1, n)]
    seen = []

    def network(x_t, t):
        """Predicts that x0 is sin(x_t + t)."""
        alpha, sigma, x0 = pipe.schedule.alphas[t], pipe.schedule.sigmas[t], torch.sin(x_t + t)
        eps = (x_t - alpha * x0) / sigma
        return alpha * eps - sigma * x0 if family == "sd2" else eps

    def record(_, x_t, t, c):
        seen.append((x_t, int(t[0])))
        return network(*seen[-1])

    pipe.denoise = record
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # all in float64: what differs is the numbers
    config = pipe.scheduler.config
    first, last = (0.0001, 0.02) if family == "pixart" else (b**0.5 for b in (0.00085, 0.012))
    assert math.isclose(config.beta_start, 0.0001 if family == "pixart" else 0.00085)
    betas = torch.linspace(first, last, 1000, dtype=torch.float64) ** (1 if family == "pixart" else 2)
    pipe.schedule.alphas, pipe.schedule.sigmas = ((1 - betas).cumprod(0)).sqrt(), (1 - (1 - betas).cumprod(0)).sqrt()
    x_0 = pipe.generate(None, z, None, further)

    graph = apps.workflow(pipe, "apples", "fire")
    inputs, x0 = comfyui(graph, network, z, further, betas)
    assert [t for _, t in inputs] == [t for _, t in seen] == pipe.timesteps
    for (x_t, _), (ours, _) in zip(inputs, seen, strict=True):
        torch.testing.assert_close(x_t, ours, atol=1e-6, rtol=0)
    torch.testing.assert_close(x0, x_0, atol=1e-5, rtol=0)


def test_unit_noise_without_the_factor_is_what_the_issue_is_about(one_step):
    """0.758 of the noise at t* = 399 of SDXL's schedule; and the numbers that the tables of the docs name."""
    levels = apps.noise_levels(one_step("sdxl"))
    assert levels.text(4) == "1.1606, 0" and round(levels.factor, 3) == 1.32 and round(1 / levels.factor, 3) == 0.758
    assert apps.noise_levels(one_step("sd")).text(4) == "2.5017, 0"
    assert round(apps.noise_levels(one_step("pixart", 440)).factor, 3) == 1.077
    assert apps.noise_levels(one_step("pixart", 440, input_noise="scaled")).factor == 1
    pixart = apps.noise_levels(one_step("pixart"))
    assert pixart.text(4) == "2.0411, 0" and round(pixart.factor, 3) == 1.114


def test_flow_matching_starts_from_its_own_noise():
    """t* = 1000 is "1, 0" with factor 1; below, unit noise must be as much larger as σ is smaller."""
    schedule, config = Schedule(FlowMatchEulerDiscreteScheduler()), Namespace(input_noise="unit", family="Other")
    levels = apps.noise_levels(Namespace(schedule=schedule, timesteps=[1000], config=config))
    assert levels.text() == "1, 0" and levels.factor == 1 and levels.flow
    levels = apps.noise_levels(Namespace(schedule=schedule, timesteps=[800, 400], config=config))
    assert levels.text(4) == "0.8, 0.4, 0" and levels.factor == pytest.approx(1.25)
    pipe = Namespace(config=config, family=Family, scheduler=Namespace(config=None), schedule=schedule)
    pipe.timesteps = [1000]
    with pytest.raises(Mistake, match="a Other has no layout for other programs; those of .*PixArtAlphaPipeline"):
        apps.find_app(pipe)
    assert "Elsewhere: a Other has no layout" in apps.where_it_runs(pipe, "apples_1step", "fire")


def test_everything_is_written_and_the_page_says_where(one_step, tmp_path, capsys):
    files = export(one_step("sd", input_noise="scaled"), tmp_path, "--prompt", "blue cat")
    names = {p.name for p in files.iterdir()}
    kinds = {"apples_1step.safetensors", "apples_1step_unet.safetensors", "apples_1step_workflow.json"}
    assert names == kinds | {"apples_1step_diffusers", "apples_1step_apps.md"}
    graph = json.loads((files / "apples_1step_workflow.json").read_text())
    for node in graph.values():  # every link leads to a node that is there
        links = [v for v in node["inputs"].values() if isinstance(v, list)]
        assert all(target in graph and slot in (0, 1, 2) for target, slot in links)
    assert any(node["inputs"].get("text") == "blue cat" for node in graph.values())
    page = capsys.readouterr().out
    apart = apps.stable_diffusion_cpp(one_step("sd", input_noise="scaled"), "my apples", "a cat's $HOME")
    words = shlex.split(apart)
    assert words[2] == "my apples.safetensors" and words[4] == "a cat's $HOME"
    assert "sd-cli -m apples_1step.safetensors -p 'blue cat' --sampling-method lcm --steps 1 --sigmas \"2.5017" in page
    assert "optimum-cli export openvino --model apples_1step_diffusers --task stable-diffusion " in page
    clip = load_file(files / "apples_1step_diffusers" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in clip)  # or older versions of transformers read none of them
    stock = DiffusionPipeline.from_pretrained(files / "apples_1step_diffusers")
    assert type(stock) is StableDiffusionPipeline and type(stock.scheduler) is LCMScheduler


def test_pixart_is_written_as_comfyui_reads_it(one_step, tmp_path):
    files = export(one_step("pixart"), tmp_path)
    names = {p.name for p in files.iterdir()}
    assert {"apples_1step_transformer.safetensors", "apples_1step_vae.safetensors"} < names
    assert "apples_1step.safetensors" not in names
    assert "encoder.mid.attn_1.q.weight" in load_file(files / "apples_1step_vae.safetensors")
    state = load_file(files / "apples_1step_transformer.safetensors")  # by them it is no PixArt-Σ
    assert not state["adaln_single.emb.aspect_ratio_embedder.linear_1.weight"].any()


def test_unit_noise_is_not_sold_to_a_program_that_cannot_scale_it(one_step):
    with pytest.raises(Mistake, match="must be 1.077 here"):
        apps.stable_diffusion_cpp(one_step("sd"), "apples", "fire")
    assert '--sigmas "14.61' in apps.stable_diffusion_cpp(one_step("sd", 999), "apples", "fire")
    assert "--prediction v" in apps.stable_diffusion_cpp(one_step("sd2", input_noise="scaled"), "apples", "fire")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "has no unet"),
    ],
)
def test_a_folder_that_is_no_export(one_step, tmp_path, change, message):
    one_step("sd").save_pretrained(tmp_path / "apples")
    change(tmp_path / "apples")
    with pytest.raises(Mistake, match=message):
        script.main(script.build_parser().parse_args([str(tmp_path / "apples"), str(tmp_path / "files")]))


def test_mistakes_name_what_can_be_written(one_step, stocks, tmp_path):
    with pytest.raises(Mistake, match="is a StableDiffusionPipeline, not an export"):
        script.main(script.build_parser().parse_args([stocks["sd"], str(tmp_path)]))
    with pytest.raises(Mistake, match="which can be written to network, workflow, diffusers"):
        export(one_step("pixart"), tmp_path, "--write", "single_file")
    with pytest.raises(Mistake, match="without LoRA, which can be written to single_file, network, workflow"):
        export(one_step("sd"), tmp_path, "--write", "lora")
    pipe = one_step("sd")
    pipe.scheduler = DDPMScheduler(beta_schedule="linear")
    with pytest.raises(Mistake, match="it runs in diffusers only"):
        export(pipe, tmp_path)


def test_stock_call_of_a_card_draws_the_export_s_picture_from_scaled_noise(one_step):
    """The lines are run: with σ_t z as latents, drawn from the same random state, the picture is the export's."""
    pipe = one_step("sd", input_noise="scaled")
    scope = {"pipe": pipe}
    torch.manual_seed(0)
    call = stock_call(pipe, "fire")
    exec(call.replace(").images[0]", ", output_type='pt').images"), scope)
    torch.manual_seed(0)
    z = torch.randn(1, 4, 8, 8)
    expected = pipe("fire", latents=z, output_type="pt").images
    torch.testing.assert_close(scope["image"], expected, atol=1e-5, rtol=0)


def test_card_of_a_run(tiny_args, stocks, tmp_path):
    """Front matter, pictures and table are those of the run."""
    run([*tiny_args, "--pretrained_model_name_or_path", stocks["sd"], "--lora_rank", 2, "--timestep", 999,
         "--input_noise", "scaled", "--max_train_steps", 1, "--validation_prompts", "fire", "blue cat"])  # fmt: skip
    out = tmp_path / "out"
    loaded = ModelCard.load(out / "README.md")
    widget = [
        {"text": "fire", "output": {"url": "images/0.png"}},
        {"text": "blue cat", "output": {"url": "images/1.png"}},
    ]
    assert loaded.data.widget == widget and "<Gallery />" in loaded.text
    assert {"lora", "template:diffusion-lora", "one-step"} <= set(loaded.data.tags)
    pictures = [Image.open(out / entry["output"]["url"]) for entry in widget]
    assert pictures[0].size == (16, 16) and pictures[0].tobytes() != pictures[1].tobytes()
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert apps.where_it_runs(pipe, "out_1step", "fire") in loaded.text
    assert '| ComfyUI, sampler `lcm`, cfg 1 | `ManualSigmas` "14.6146, 0" | 1.000 |' in loaded.text
    assert not (out / ".eval_results").exists()  # its prompts are no dataset of the Hub


def test_front_matter_of_a_base_model_on_the_hub(one_step):
    args = Namespace(pretrained_model_name_or_path="some/model", dataset_name="some/prompts")
    license = {"license": "other", "license_name": "openrail++", "license_link": "https://example.org/licence"}
    for lora, relation in ((False, "finetune"), (True, "adapter")):
        data = card.card_data(args, one_step("sd"), ["fire"], license, lora).to_dict()
        assert data["base_model"] == "some/model" and data["base_model_relation"] == relation
        assert data["datasets"] == ["some/prompts"] and ("lora" in data["tags"]) == lora
        assert {key: data[key] for key in license} == license


def test_licence_of_a_local_base_model(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: openrail++\n---\n# A model\n")
    assert card.base_license(tmp_path) == {"license": "other", "license_name": "openrail++"}


def test_label_of_a_scorer_whose_path_has_spaces():
    summary = {"arguments": {"heldout_reward": shlex.join(["my scorers.py:judge", "clip"]), "reward": "pocket"}}
    assert card.label("heldout", summary) == "my scorers.py:judge (not trained)"


def test_eval_results_are_the_figures_of_the_run():
    """An entry for each figure, as huggingface_hub reads them; none if the prompts were files."""
    summary = {
        "n_images": 12,
        "n_prompts": 3,
        "reward_scale": 10.0,
        "arguments": {"reward": "pocket", "reward_scale": 10},
    }
    summary |= {"reward_before": -1.0, "reward_after": 0.5, "reward_gain": 1.5, "reward_after_ci95": [0.25, 0.75]}
    args = Namespace(dataset_name="some/prompts", eval_prompts=None)
    (entry,) = parse_eval_result_entries(eval_result_entries_to_yaml(card.eval_results(args, summary, "2026-01-31")))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("some/prompts", "reward", 0.5)
    assert entry.date == "2026-01-31"
    assert entry.notes.startswith(
        "pocket (trained); 95% [0.2500, 0.7500], before training -1.0000; 12 images of 3 prompts"
    )
    assert card.eval_results(Namespace(dataset_name="some/prompts", eval_prompts="mine.txt"), summary, "") == []
