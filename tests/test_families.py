"""Each family on tiny networks of the real classes: training's forward, the export and the stock pipeline agree."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import train_diff_instruct_pp as script
from diff_instruct.export.card import stock_call
from diff_instruct.families import FAMILIES
from diff_instruct.models.lora import trained_parameters
from diff_instruct.models.reference import encode_null
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import Schedule
from tests.families import FAMILY, save
from tests.runs import load, watch_actors, watch_export
from tests.tiny import PROMPTS, tiny_sd


NAMES = {
    "pixart": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sd": "StableDiffusionPipeline",
    "sd2": "sd2",
    "sdxl": "StableDiffusionXLPipeline",
    "kolors": "KolorsPipeline",
}
STOCK = {key: FAMILY[name] for key, name in NAMES.items()}
MORE = "pixart_sigma", "kolors"  # whose networks are those of others: what takes long is slow
TRAINED = [pytest.param(key, marks=pytest.mark.slow) if key in (*MORE, "sd2") else key for key in STOCK]
T_STAR = {"pixart": 400, "pixart_sigma": 400, "sd": 625, "sd2": 625, "sdxl": 399, "kolors": 399}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family to the folder of its tiny pipeline."""
    return {key: save(name, tmp_path_factory.mktemp(key)) for key, name in NAMES.items()}


@pytest.fixture
def family_args(tiny_args, models):
    """Arguments, as `tiny_args`, for a family."""
    return lambda family, *options: [*tiny_args, "--pretrained_model_name_or_path", models[family], *map(str, options)]


def one_step(stock, timestep, **call):
    """The stock pipeline of the family with one step at t*."""
    family = FAMILIES[type(stock).__name__]
    call.update({**family.unguided, **family.options})
    stock.set_progress_bar_config(disable=True)
    return stock(num_inference_steps=1, timesteps=[timestep], height=16, width=16, output_type="pt", **call).images


def stock_pipeline(family, pipe):
    """As the model card says; the call in its last line is run, too."""
    scope = {"pipe": pipe}
    exec(stock_call(pipe, "a red apple"), scope)
    assert scope["image"].size == (16, 16)
    return scope["stock"]


def noise(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("family", TRAINED)
def test_trained_exported_and_stock_give_the_same_images(family_args, tmp_path, monkeypatch, family, lora):
    """After some steps, for prompts of different lengths, an empty one among them: max abs difference ≤ 1e-5."""
    seen = {}

    def exported(pipe):  # the network that has just been trained, as training calls it
        c = Conditioning(pipe.encode_prompt, "cpu")(prompts)
        with torch.no_grad():
            seen["trained"] = pipe.decode(seen["generator"].generate(z, c)).clamp(0, 1)

    watch_actors(monkeypatch, lambda actors: seen.update(generator=actors.generator))
    watch_export(monkeypatch, exported)
    prompts, z = [*PROMPTS, ""], noise(len(PROMPTS) + 1)
    command = family_args(family, "--lora_rank", lora, *(["--lora_alpha", 4] if lora else []), "--learning_rate", 1e-2)
    args = parse_args(command)
    script.main(args)

    out = tmp_path / "out"
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_one_step", "OneStepPipeline"] and index["timestep"] == T_STAR[family]
    if index["text_encoder"][1] == "CLIPTextModel":  # by names that older versions of transformers read, too
        assert all(k.startswith("text_model.") for k in load_file(out / "text_encoder" / "model.safetensors"))
    shipped = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    shipped.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert seen["trained"].std() > 0.03
    for images in (
        shipped(prompts, latents=z, output_type="pt").images,
        again(prompts, latents=z, output_type="pt").images,
        one_step(stock_pipeline(family, again), T_STAR[family], prompt=prompts, latents=z),
    ):
        torch.testing.assert_close(images, seen["trained"], atol=1e-5, rtol=0)

    reference = STOCK[family].stock().from_pretrained(args.pretrained_model_name_or_path)
    loads_lora = STOCK[family].has_lora_files()
    if loads_lora:
        reference.scheduler = LCMScheduler.from_config(shipped.scheduler.config)
        untrained = one_step(reference, T_STAR[family], prompt=prompts, latents=z)
        assert (untrained - seen["trained"]).abs().max() > 1e-3
    lora_file = out / "pytorch_lora_weights.safetensors"
    assert lora_file.is_file() == (lora > 0 and loads_lora)
    told = "loads no LoRA files" in (out / "README.md").read_text()
    assert told == (lora > 0 and not loads_lora)
    assert lora == 0 or f"`{STOCK[family].name}" in (out / "README.md").read_text()
    if lora_file.is_file():
        reference.load_lora_weights(out)
        images = one_step(reference, T_STAR[family], prompt=prompts, latents=z)
        torch.testing.assert_close(images, seen["trained"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family, lora, ta_lora",
    [
        pytest.param(
            family,
            *ranks,
            marks=pytest.mark.slow if family in (*MORE, "sd2") or family != "pixart" and 0 < sum(ranks) < 4 else (),
        )
        for family in STOCK
        for ranks in ((0, 0), (0, 2), (2, 0), (2, 2))
    ],
)
def test_only_what_is_trained_changes(family_args, monkeypatch, family, lora, ta_lora):
    """Pretrain and align, with checkpointing: the reference stays bit for bit, each trained parameter moves."""
    seen, x_t, t = {}, noise(1), torch.tensor([300])

    def reference_output(actors):
        with torch.no_grad():
            return actors.ref(x_t, t, seen["c"])

    def look(actors):
        seen.update(actors=actors, c=actors.pipe.encode_prompt(["a red apple"]))
        seen["networks"] = actors.generator.network, actors.ta.network
        seen["start"] = [{k: v.detach().clone() for k, v in n.named_parameters()} for n in seen["networks"]]
        seen["before"] = reference_output(actors)

    watch_actors(monkeypatch, look)
    options = ["--lora_rank", lora, "--ta_lora_rank", ta_lora, "--pretrain_steps", 2, "--max_train_steps", 2]
    options += ["--checkpointing_steps", 0]
    script.main(parse_args(family_args(family, *options, "--gradient_checkpointing", "--validation_steps", 0)))

    actors = seen["actors"]
    assert torch.equal(reference_output(actors), seen["before"])
    assert (actors.ta.network is actors.ref.network) == (ta_lora > 0)
    assert (actors.generator.network is actors.ref.network) == (lora > 0)  # one base for as many roles as can be
    for network, start, rank in zip(seen["networks"], seen["start"], (lora, ta_lora)):
        for key, value in network.named_parameters():
            is_trained = "lora" in key or not rank
            assert value.requires_grad == is_trained, key
            assert torch.equal(value, start[key]) != is_trained, key
            assert value.dtype == torch.float32 or not is_trained


@pytest.mark.parametrize("family", STOCK)
def test_learned_sigma_of_the_ta_is_left_alone(family_args, family):
    """The TA's loss has no gradient on output channels beyond the latents' (PixArt's learned sigma)."""
    _, models, stock, pipe = load(family_args(family))
    ta = getattr(stock, models.denoiser).requires_grad_(True)
    pipe.denoise(ta, noise(2), torch.tensor([100, 700]), pipe.encode_prompt(PROMPTS[:2])).square().sum().backward()
    last = ta.proj_out if models.denoiser == "transformer" else ta.conv_out
    rows = last.weight.grad.abs().flatten(1).sum(dim=1)
    if models.denoiser == "transformer":  # (patch, patch, channels)
        rows = rows.view(4, 8)
        assert (rows[:, 4:] == 0).all()
        rows = rows[:, :4]
    assert (rows > 0).all()


@pytest.mark.parametrize("family", STOCK)
def test_one_empty_prompt_leaves_the_others_conditional(family_args, family):
    _, _, _, pipe = load(family_args(family))
    encode, z = Conditioning(pipe.encode_prompt, "cpu"), noise(1).repeat(3, 1, 1, 1)
    prompts = ["a red apple", "", "blue cat"]
    with torch.no_grad():
        mixed = pipe.generate(pipe.denoiser, z, encode(prompts))
        alone = torch.cat([pipe.generate(pipe.denoiser, z[:1], encode([p])) for p in prompts])
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=0)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3 and (mixed[0] - mixed[2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", STOCK)
def test_guided_reference_is_that_of_the_stock_pipeline(family_args, family):
    """c, ∅ and u + w (c − u) as the stock pipeline has them: its noise prediction inside one guided step."""
    _, models, stock, pipe = load(family_args(family))
    reference, seen = getattr(stock, models.denoiser), []
    encode, z, scale = Conditioning(pipe.encode_prompt, "cpu"), noise(1), 4.5
    original = stock.scheduler.step
    stock.scheduler.step = lambda output, t, *rest, **kwargs: (
        seen.append((output, t)),
        original(output, t, *rest, **kwargs),
    )[1]
    stock.scheduler.scale_model_input = lambda x, t: x  # SDXL's Euler sampler works in other units
    stock.set_progress_bar_config(disable=True)
    options = models.family.options
    stock("blue cat", latents=z, num_inference_steps=2, guidance_scale=scale, height=16, width=16, **options)
    guided, t = seen[0]
    scale_z = stock.scheduler.init_noise_sigma
    t = torch.tensor([int(t)])
    with torch.no_grad():
        c, null = (
            pipe.denoise(reference, z * scale_z, t, e)
            for e in (encode(["blue cat"]), encode_null(models.family, stock, pipe, encode))
        )
    torch.testing.assert_close(null + scale * (c - null), guided[:, :4], atol=1e-5, rtol=1e-4)


def test_sdxl_null_is_zero_and_its_empty_prompt_is_not(family_args):
    _, models, stock, pipe = load(family_args("sdxl"))
    encode = Conditioning(pipe.encode_prompt, "cpu")
    assert all((v == 0).all() for v in encode_null(models.family, stock, pipe, encode).values())
    assert all((v != 0).any() for v in encode([""]).values())


@pytest.mark.parametrize("family", ["sd", "sd2"])
def test_prediction_types(family_args, family):
    """x̂0 and ε̂ of the schedule agree with diffusers' own conversion."""
    _, _, stock, pipe = load(family_args(family))
    schedule, x_t, output, t = Schedule(pipe.scheduler), noise(1), noise(1, seed=1), torch.tensor([300])
    step = pipe.scheduler.step(output, 300, x_t)
    torch.testing.assert_close(schedule.x0(output, x_t, t), step.pred_original_sample, atol=1e-5, rtol=1e-4)
    alpha, sigma = schedule(t)
    eps = schedule.epsilon(output, x_t, t)
    torch.testing.assert_close(alpha * schedule.x0(output, x_t, t) + sigma * eps, x_t, atol=1e-5, rtol=1e-4)


@pytest.fixture
def start_points(tmp_path, models):
    """The same other SD network as a pipeline, a network's folder, a .safetensors file and a .bin file."""
    folder = tiny_sd(tmp_path / "pipeline", seed=5)
    unet = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    unet.save_pretrained(tmp_path / "network")
    state = unet.state_dict()
    save_file(state, tmp_path / "unet.safetensors")
    torch.save(state, tmp_path / "unet.bin")
    return state, [tmp_path / name for name in ("pipeline", "network", "unet.safetensors", "unet.bin")]


def test_generator_starts_from_a_pipeline_a_network_or_a_file(family_args, start_points):
    state, paths = start_points
    for path in paths:
        start = ["--pretrained_generator_name_or_path", path, "--input_noise", "unit"]
        command = family_args("sd", *start, "--timestep", 399)
        *_, pipe = load(command)
        assert pipe.config.timestep == 399
        got = pipe.unet.state_dict()
        assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)
        with pytest.raises(ValueError, match=r"names no t\*"):
            models_of(parse_args([str(a) for a in command[:-2]]))
        with pytest.raises(ValueError, match="does not say what enters at t"):
            models_of(parse_args(family_args("sd", *start[:2], "--timestep", 399)))


def test_generator_file_on_the_hub(family_args, start_points, monkeypatch):
    from diff_instruct.models import weight_files

    asked, (_, paths) = [], start_points
    monkeypatch.setattr(
        weight_files, "hf_hub_download", lambda repo, name, **_: (asked.append((repo, name)), str(paths[2]))[1]
    )
    *_, pipe = load(
        family_args(
            "sd",
            "--pretrained_generator_name_or_path",
            "a/b/c/unet.safetensors",
            "--timestep",
            1,
            "--input_noise",
            "unit",
        )
    )
    assert set(asked) == {("a/b", "c/unet.safetensors")}


@pytest.mark.parametrize("family", STOCK)
def test_adapters_are_few(family_args, family):
    _, _, _, pipe = load(family_args(family, "--lora_rank", 2))
    trained = sum(p.numel() for p in trained_parameters(pipe.denoiser, "generator").values())
    assert 0 < trained < 0.2 * sum(p.numel() for p in pipe.denoiser.parameters())


@pytest.mark.parametrize("preset", ["di*", "didr"])
@pytest.mark.parametrize("family", ["pixart", "sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_every_method_in_every_family(family_args, tmp_path, family, preset):
    """bfloat16, checkpointing and LoRA on both networks at once: it runs, and every gradient has a size."""
    options = ["--preset", preset, "--lora_rank", 2, "--ta_lora_rank", 2, "--gradient_checkpointing"]
    options += ["--mixed_precision", "bf16", "--max_train_steps", 2, "--validation_steps", 0]
    script.main(parse_args(family_args(family, *options, "--reward_scale", 1)))
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "norm_divergence" in row]
    assert len(rows) == 2 and all(row["norm_divergence"] > 0 and row["norm_reward"] > 0 for row in rows)
    assert rows[-1]["skipped_steps"] == 0
