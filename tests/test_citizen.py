"""`OneStepPipeline` among diffusers' pipelines: what users of diffusers type works, or is one clear error."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from pipeline_one_step import OneStepPipeline
from tests.families import BUILD, FAMILY, SIDES, save
from tests.tiny import PROMPTS


# a UNet of one and of two text encoders, a plain transformer, one with modulation, one that guidance enters
IN_SHORT = "StableDiffusionPipeline StableDiffusionXLPipeline SanaPipeline FluxPipeline ZImagePipeline".split()
WITH_LORA = [name for name in BUILD if FAMILY[name].has_lora_files()]


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    """Name in `BUILD` to a function that loads its tiny stock pipeline."""
    folders = {}

    def load(name):
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp("stock") / name)
        stock = FAMILY[name].stock().from_pretrained(folders[name], **dict.fromkeys(FAMILY[name].unused))
        stock.set_progress_bar_config(disable=True)
        return stock

    return load


def noise(pipe, n, seed=0):
    return torch.randn(n, *pipe.latent_shape(*size(pipe)), generator=torch.Generator().manual_seed(seed))


def size(pipe):
    """Height and width that the tiny pipelines of a family are drawn at."""
    return [max(side for name, side in SIDES.items() if FAMILY[name].name == pipe.config.family)] * 2


def draw(pipe, n=2, **call):
    height, width = size(pipe)
    given = {"prompt": PROMPTS[:n], "latents": noise(pipe, n), "output_type": "pt"} | call
    return pipe(height=height, width=width, **given).images


def draw_stock(pipe, stock, n=2):
    """The stock pipeline's pictures of the same noise, as the model card has the call."""
    (height, width), z, images = size(pipe), noise(pipe, n), []
    call = {**pipe.family.stock_arguments(pipe), "height": height, "width": width, "output_type": "pt"}
    for rows in torch.arange(n).split(1 if pipe.family.alone else n):
        latents = pipe.family.stock_latents(z[rows])
        images.append(stock(prompt=[PROMPTS[i] for i in rows], latents=latents, **call).images)
    return torch.cat(images)


def stock_of(pipe):
    scope = {"pipe": pipe}
    exec(pipe.family.stock_setup(), scope)
    scope["stock"].set_progress_bar_config(disable=True)
    return scope["stock"]


@pytest.mark.parametrize("name", BUILD)
def test_from_pipe_both_ways(stocks, name):
    """Stock to one step, with the family's t*, to stock with the same parts, and back: the same pictures."""
    stock = stocks(name)
    pipe = OneStepPipeline.from_pipe(stock, timestep=FAMILY[name].timestep)
    assert pipe.denoiser is getattr(stock, FAMILY[name].denoiser)
    assert isinstance(pipe, OneStepPipeline) and pipe.config.family == FAMILY[name].name
    image, there = draw(pipe), stock_of(pipe)
    torch.testing.assert_close(draw_stock(pipe, there), image, atol=1e-5, rtol=0)
    again = OneStepPipeline.from_pipe(pipe.family.stock().from_pipe(pipe, **dict.fromkeys(pipe.family.unused)))
    assert again.timesteps == pipe.timesteps
    torch.testing.assert_close(draw(again), image)


def style_lora(pipe, file, seed, rank=2):
    """A LoRA of the family's network, as its trainers write it: random, and strong enough to be seen."""
    torch.manual_seed(seed)
    network = type(pipe.denoiser).from_config(pipe.denoiser.config)
    targets = pipe.family.lora_targets
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, network)
    state = {f"{pipe.family.denoiser}.{k}": v.contiguous() for k, v in get_peft_model_state_dict(network).items()}
    save_file(state, file)
    return str(file)


@pytest.mark.parametrize("name", [n if n in IN_SHORT else pytest.param(n, marks=pytest.mark.slow) for n in WITH_LORA])
def test_style_loras_on_top(stocks, name, tmp_path):
    """At scales 0, 0.5 and 1, two together, fused, unloaded: what the stock pipeline draws with the same calls."""
    files = [style_lora(OneStepPipeline.from_pipe(stocks(name)), tmp_path / f"{i}.safetensors", i) for i in (1, 2)]
    pipe = OneStepPipeline.from_pipe(stocks(name))
    stock = stock_of(OneStepPipeline.from_pipe(stocks(name)))
    plain = draw(pipe)
    for p in (pipe, stock):
        for file, adapter in zip(files, ("style", "other")):
            p.load_lora_weights(file, adapter_name=adapter)
    seen = []
    for adapters, weights in (("style", 0.0), ("style", 0.5), ("style", 1.0), (["style", "other"], [1.0, 0.7])):
        for p in (pipe, stock):
            p.set_adapters(adapters, weights)
        seen.append(draw(pipe))
        torch.testing.assert_close(seen[-1], draw_stock(pipe, stock), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], plain, atol=1e-6, rtol=0)
    apart = [(a - b).abs().max() for a, b in zip(seen, seen[1:])]
    assert min(apart) > 1e-3 and pipe.get_active_adapters() == ["style", "other"]
    pipe.fuse_lora(components=[pipe.family.denoiser], adapter_names=["style", "other"])
    torch.testing.assert_close(draw(pipe), seen[-1], atol=1e-4, rtol=0)
    pipe.unfuse_lora(components=[pipe.family.denoiser])
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, atol=1e-4, rtol=0)


def test_no_lora_files_where_the_stock_has_none(stocks):
    with pytest.raises(ValueError, match="loads no LoRA files"):
        OneStepPipeline.from_pipe(stocks("PixArtAlphaPipeline")).load_lora_weights("style.safetensors")


@pytest.mark.parametrize("name", BUILD)
def test_prompts_encoded_by_themselves(stocks, name, tmp_path):
    """Text parts alone, loaded without the network; then the network alone with what they gave."""
    pipe = OneStepPipeline.from_pipe(stocks(name))
    pipe.save_pretrained(tmp_path)
    texts = {n: None for n, part in pipe.components.items() if "text_encoder" in n or "tokenizer" in n}
    text = OneStepPipeline.from_pretrained(tmp_path, **{pipe.family.denoiser: None}, vae=None)
    network = DiffusionPipeline.from_pretrained(tmp_path, **texts, trust_remote_code=True)
    assert text.denoiser is None and text.vae is None and network.text_encoder is None
    c = text.encode_prompt(PROMPTS[:2])
    torch.testing.assert_close(draw(network, prompt=None, prompt_embeds=c), draw(pipe), atol=1e-5, rtol=0)
    one = text.encode_prompt(PROMPTS[0])
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in text.encode_prompt(PROMPTS[:1]).items()}
    with pytest.raises(ValueError, match="encodes prompts and nothing else"):
        text("fire")
    with pytest.raises(ValueError, match="no text encoder"):
        network("fire")


def test_somebody_who_has_imported_the_class_trusts_it(stocks, tmp_path):
    """`OneStepPipeline.from_pretrained` runs the code that is imported, and asks for no leave to run the folder's."""
    pipe = OneStepPipeline.from_pipe(stocks("StableDiffusionPipeline"), timestep=[625, 125])
    pipe.save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "pipeline_one_step.py").write_text("raise SystemExit\n")
    loaded = OneStepPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16, device_map="cpu")
    assert loaded.timesteps == [625, 125] and {loaded.unet.dtype, loaded.vae.dtype} == {torch.bfloat16}
    noise = {"generator": torch.Generator().manual_seed(0), "latents": None}
    half = draw(loaded, **noise).float()
    assert half.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype=torch.bfloat16)
    noise["generator"] = torch.Generator().manual_seed(0)
    torch.testing.assert_close(draw(again, **noise).float(), half)


def test_what_the_stock_is_told_too(stocks):
    """Steps and guidance are taken where they say what happens anyway; else one clear line."""
    pipe = OneStepPipeline.from_pipe(stocks("StableDiffusionPipeline"), timestep=[625, 125])
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "negative_prompt": ""}
    told = draw(pipe, generator=torch.Generator().manual_seed(0), **call)
    torch.testing.assert_close(told, draw(pipe, generator=torch.Generator().manual_seed(0), guidance_scale=0))
    flux, z_image = (OneStepPipeline.from_pipe(stocks(name)) for name in ("FluxPipeline", "ZImagePipeline"))
    flux.check_unchangeable(1, flux.config.embedded_guidance, None)
    z_image.check_unchangeable(1, 0.0, None)  # its 1 is α = 2
    for p, call, message in (
        (pipe, {"num_inference_steps": 50}, "takes 2 step"),
        (pipe, {"guidance_scale": 7.5}, "guidance_scale must be 1"),
        (flux, {"guidance_scale": 1.0}, "guidance_scale must be 3.5"),
        (z_image, {"guidance_scale": 1.0}, "guidance_scale must be 0"),
        (pipe, {"negative_prompt": "blurry"}, "draws without guidance"),
        (pipe, {"callback_on_step_end_tensor_inputs": ["sigmas"]}, "latents"),
    ):
        with pytest.raises(ValueError, match=message):
            p("fire", **call)


def test_callback_on_step_end(stocks):
    """After each step, with x_t of the next and at last x0, which it may replace."""
    pipe, seen = OneStepPipeline.from_pipe(stocks("StableDiffusionPipeline"), timestep=[999, 625, 125]), []

    def watch(pipe, i, t, tensors):
        seen.append((i, t, tensors["latents"]))
        return {}

    def latents(**call):
        return draw(pipe, generator=torch.Generator().manual_seed(0), output_type="latent", **call)

    x0 = latents(callback_on_step_end=watch)
    torch.testing.assert_close(x0, latents())
    assert [(i, t) for i, t, _ in seen] == [(0, 999), (1, 625), (2, 125)] and pipe.num_timesteps == 3
    assert seen[-1][2] is x0
    replaced = latents(callback_on_step_end=lambda pipe, i, t, tensors: {"latents": seen[i][2]} if i == 1 else {})
    torch.testing.assert_close(replaced, x0)
    halved = latents(callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"] / 2})
    assert (halved - x0).abs().max() > 1e-2
    latents(callback_on_step_end=lambda pipe, i, t, tensors: tensors, callback_on_step_end_tensor_inputs=[])


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "QwenImagePipeline"])
def test_tiles_and_slices(stocks, name, monkeypatch):
    """Slices change nothing; a picture larger than a tile is decoded in tiles."""
    pipe, tiled = OneStepPipeline.from_pipe(stocks(name)), []
    image = draw(pipe)
    pipe.enable_vae_slicing()
    torch.testing.assert_close(draw(pipe), image, atol=1e-5, rtol=0)
    pipe.enable_vae_tiling()
    names = ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_size", "tile_latent_min_size")
    strides = ("tile_sample_stride_height", "tile_sample_stride_width")
    for key, value in [*((key, 8) for key in names), *((key, 6) for key in strides)]:
        if hasattr(pipe.vae, key):
            setattr(pipe.vae, key, value // 2 if "latent" in key else value)
    decode = pipe.vae.tiled_decode
    monkeypatch.setattr(
        pipe.vae, "tiled_decode", lambda *args, **options: (tiled.append(1), decode(*args, **options))[1]
    )
    assert draw(pipe).shape == image.shape and tiled
