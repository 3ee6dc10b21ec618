"""Each flow-matching family on tiny networks of the real classes: training's forward, the export and the stock
pipeline agree; so do the guided reference and LoRA files. A new family passes these tests, see docs/families.md."""

import copy
import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

import evaluate_one_step as evaluation
import train_diff_instruct_pp as script
from diff_instruct.export.card import stock_call
from diff_instruct.export.export import save_lora
from diff_instruct.families import FAMILIES
from diff_instruct.mistake import Mistake
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.lora import add_lora, merged, trained_parameters
from diff_instruct.models.reference import encode_null, sample
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.training.arguments import parse_args
from tests.families import FAMILY, FLOW, save
from tests.families.parts import SIDE
from tests.runs import load, watch_actors, watch_export


PROMPTS = ["a red apple", "blue cat and the big dog", ""]
WHOLE = [name for name in FLOW if name in FAMILIES]  # without variants
GUIDED = [name for name in WHOLE if FAMILY[name].has_null and not FAMILY[name].renormalised]
SIZE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name to the folder of its tiny pipeline, made when it is asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@pytest.fixture
def flow_args(tiny_args, models):
    """Arguments, as `tiny_args`, for a family."""

    def arguments(name, *options):
        words = [*tiny_args, "--pretrained_model_name_or_path", models(name), "--resolution", SIDE, "--cfg_scale", 1]
        return [str(w) for w in (*words, *options)]

    return arguments


def noise(pipe, n, seed=0):
    return torch.randn(n, *pipe.latent_shape(SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def stock_images(name, pipe, prompts, z, stock=None):
    """What the stock pipeline draws from z when it is called as the model card says."""
    scope, sigma = {"pipe": pipe}, pipe.timesteps[0] / pipe.schedule.steps
    exec(pipe.family.stock_setup(), scope)
    if stock is not None:
        stock.scheduler = scope["stock"].scheduler
        scope["stock"] = stock
    scope["stock"].set_progress_bar_config(disable=True)
    asked, images = {**pipe.family.stock_arguments(pipe), "output_type": "pt", **SIZE}, []
    for rows in calls(pipe, len(z)):
        torch.manual_seed(7)
        latents = pipe.family.stock_latents(z[rows], sigma)
        images.append(scope["stock"](prompt=[prompts[i] for i in rows], latents=latents, **asked).images)
    return pipe.family.opaque(torch.cat(images))


def calls(pipe, n):
    """Which of n rows the stock pipeline is asked for at once."""
    return torch.arange(n).split(1 if pipe.family.alone else n)


def seeded_noise(pipe, z):
    """The noise of the further steps as the stock's sampler draws it: from torch's own generator, some of tokens."""
    noise, family = torch.empty(len(pipe.timesteps) - 1, *z.shape), pipe.family
    for rows in calls(pipe, len(z)):
        torch.manual_seed(7)
        for eps in noise:
            eps[rows] = family.from_tokens(torch.randn(family.tokens(z[rows]).shape), z[rows].shape)
    return noise


def ours(pipe, prompts, z, act=nullcontext):
    """What the generator draws from z, as training calls it."""
    encode = Conditioning(pipe.encode_prompt, "cpu")
    with torch.no_grad(), act():
        x0 = pipe.generate(pipe.denoiser, z, encode(prompts), seeded_noise(pipe, z))
        return pipe.decode(x0).clamp(0, 1)


@pytest.mark.parametrize("timesteps", [[1000], pytest.param([700], marks=pytest.mark.slow), [1000, 700, 300]])
@pytest.mark.parametrize("name", FLOW)
def test_equals_the_stock_pipeline(flow_args, record_property, name, timesteps):
    *_, pipe = load(flow_args(name, "--timestep", *timesteps))
    z = noise(pipe, len(PROMPTS))
    images = ours(pipe, PROMPTS, z)
    expected = stock_images(name, pipe, PROMPTS, z)
    record_property("max_abs_difference", (images - expected).abs().max().item())
    print(name, timesteps, (images - expected).abs().max().item(), images.std().item())
    assert images.std() > 0.03 and images.flatten(1).std(dim=1).min() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    alone = (
        torch.cat([ours(pipe, [p], z[i : i + 1]) for i, p in enumerate(PROMPTS)]) if len(timesteps) == 1 else images
    )
    torch.testing.assert_close(images, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "SanaPipeline"])
def test_the_cards_call_of_several_steps_draws_one_picture(flow_args, name):
    """Stable Diffusion 3's pipeline does not hand its generator to the steps; Sana's does."""
    *_, pipe = load(flow_args(name, "--timestep", 1000, 600))
    scope = {"pipe": pipe}
    drawn = [exec(stock_call(pipe, "a red apple"), scope) or scope["image"].tobytes() for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 10


@pytest.mark.parametrize("name", GUIDED)
def test_guided_reference_is_that_of_the_stock_pipeline(flow_args, name):
    """∅ + α (c − ∅) as the stock pipeline has it in a step from σ = 0.8: the same x̂0, prompts of all lengths."""
    _, models, stock, pipe = load(flow_args(name, "--timestep", 800))
    encode, z, scale = Conditioning(pipe.encode_prompt, "cpu"), noise(pipe, len(PROMPTS)), 3.0
    reference = Denoiser(pipe, getattr(stock, models.denoiser))
    null = {k: v.expand(len(z), *v.shape[1:]) for k, v in encode_null(models.family, stock, pipe, encode).items()}
    t = torch.full((len(z),), 800)
    with torch.no_grad():
        guided = reference.guided(z, t, encode(PROMPTS), null, scale)
        pixels = pipe.decode(guided.guided).clamp(0, 1)
    assert (guided.cond - guided.uncond).abs().max() > 1e-2
    scope = {"pipe": pipe}
    exec(pipe.family.stock_setup(), scope)
    stock.scheduler = scope["stock"].scheduler
    steps = {k: v for k, v in pipe.family.stock_arguments(pipe).items() if k in ("sigmas", "timesteps")}
    drawn = sample(models, stock, PROMPTS, z, 1, scale, (SIDE, SIDE), **steps)
    torch.testing.assert_close(drawn, pixels, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", GUIDED)
def test_null_is_asked_for_where_guidance_acts(flow_args, monkeypatch, name):
    """Guided rows are as with guidance everywhere, the others as without, and cost no second row."""
    _, models, stock, pipe = load(flow_args(name, "--timestep", 800))
    encode, z, asked = Conditioning(pipe.encode_prompt, "cpu"), noise(pipe, len(PROMPTS)), []
    reference = Denoiser(pipe, getattr(stock, models.denoiser))
    monkeypatch.setattr(
        Denoiser, "x0", lambda self, x, *rest, x0=Denoiser.x0: asked.append(len(x)) or x0(self, x, *rest)
    )
    null = {k: v.expand(len(z), *v.shape[1:]) for k, v in encode_null(models.family, stock, pipe, encode).items()}
    t = torch.tensor([500] + [800] * (len(z) - 1))
    with torch.no_grad():
        everywhere, low, nowhere = (
            reference.guided(z, t, encode(PROMPTS), null, 3.0, interval)
            for interval in ((0.0, 1.0), (0.5, 0.7), (0.6, 0.7))
        )
    assert asked == [2 * len(z), len(z) + 1, len(z)]
    near = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    near(low.guided[:1], everywhere.guided[:1])
    near(low.guided[1:], everywhere.cond[1:])
    near(nowhere.guided, everywhere.cond)


@pytest.mark.parametrize("name", WHOLE)
def test_the_references_own_sampler_draws(flow_args, name):
    """As the evaluation and samples.png ask for it: two images of each prompt, from noise as latents."""
    _, models, stock, pipe = load(flow_args(name))
    scale, z = 3.0 if models.has_null else 1.0, noise(pipe, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = sample(models, stock, PROMPTS[:2], z, 3, scale, (SIDE, SIDE), 2, generators)
    assert images.shape == (4, 3, SIDE, SIDE) and images.isfinite().all() and images.std() > 0.01
    alone = sample(models, stock, PROMPTS[1:2], z[2:3], 3, scale, (SIDE, SIDE), 1, torch.Generator().manual_seed(2))
    torch.testing.assert_close(images[2:3], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FLOW)
def test_the_rewards_gradient_reaches_pixels_out_of_range(flow_args, name):
    """`decode` does not clamp, in any family."""
    *_, pipe = load(flow_args(name))
    with torch.no_grad():
        for p in list(pipe.vae.decoder.parameters())[-2:]:  # of the last layer: so that pixels leave [0, 1]
            p.mul_(50)
    x0 = noise(pipe, 1).requires_grad_()
    pixels = pipe.pixels(x0)
    outside = (pixels < 0) | (pixels > 1)
    assert outside.any()
    (pipe.decode(x0) * outside[:, :3]).sum().backward()
    assert x0.grad.abs().sum() > 0


TRAINED = [(name, *ranks) for name in FLOW for ranks in [(0, 0), (2, 2), (0, 2)]]
FAST = [
    ("StableDiffusion3Pipeline", 2, 2),
    ("SanaPipeline", 0, 2),
    ("QwenImagePipeline", 2, 2),
    ("ZImagePipeline", 0, 0),
]


@pytest.mark.parametrize(
    "name, lora, ta_lora", [pytest.param(*c, marks=[] if c in FAST else pytest.mark.slow) for c in TRAINED]
)
def test_trained_exported_and_stock_agree(flow_args, tmp_path, monkeypatch, name, lora, ta_lora):
    """A run, with checkpointing: the reference stays, the generator moves; export, round trip, stock and LoRA file."""
    seen = {}

    def exported(pipe):
        seen["trained"] = seen["generator"], ours(pipe, PROMPTS, seen["z"], seen["generator"].act)

    def look(actors):
        seen.update(generator=actors.generator, z=noise(actors.pipe, len(PROMPTS)), actors=actors)
        seen["start"] = {k: v.detach().clone() for k, v in actors.generator.network.named_parameters()}
        seen["before"] = reference_output(actors)

    def reference_output(actors):
        with torch.no_grad():
            c = Conditioning(actors.pipe.encode_prompt, "cpu")(PROMPTS[:1])
            return actors.ref(noise(actors.pipe, 1), torch.tensor([300]), c)

    watch_actors(monkeypatch, look)
    watch_export(monkeypatch, exported)
    ranks = [
        "--lora_rank",
        lora,
        *(["--lora_alpha", 4] if lora else []),
        "--ta_lora_rank",
        ta_lora,
        "--learning_rate",
        1e-2,
    ]
    options = [*ranks, "--max_train_steps", 2, "--checkpointing_steps", 0, "--validation_steps", 0]
    options += ["--gradient_checkpointing", "--pretrain_steps", 1, "--pretrain_cfg_scale", 1, "--num_eval_prompts", 2]
    args = parse_args(flow_args(name, *options))
    script.main(args)

    assert torch.equal(reference_output(seen["actors"]), seen["before"])
    trained = trained_parameters(seen["generator"].network, seen["generator"].adapter)
    moved = {k for k, v in trained.items() if not torch.equal(v, seen["start"][k])}
    with seen["generator"].act():  # nothing reads, for example, what Qwen-Image's last block makes of the prompt
        c = Conditioning(seen["actors"].pipe.encode_prompt, "cpu")(PROMPTS)
        seen["generator"].generate(seen["z"], c).square().sum().backward()
    unread = {k for k, p in trained.items() if p.grad is None or not p.grad.any()}
    assert trained.keys() - moved <= unread and len(unread) < 0.3 * len(trained), sorted(unread)

    out, (_, images) = tmp_path / "out", seen["trained"]
    shipped = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    shipped.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config.embedded_guidance == shipped.config.embedded_guidance
    for drawn in (
        *(p.family.opaque(p(PROMPTS, latents=seen["z"], output_type="pt", **SIZE).images) for p in (shipped, again)),
        stock_images(name, again, PROMPTS, seen["z"]),
    ):
        torch.testing.assert_close(drawn, images, atol=1e-5, rtol=0)
    unused = dict.fromkeys(FAMILY[name].unused)
    stock = FAMILY[name].stock().from_pretrained(args.pretrained_model_name_or_path, **unused)
    untrained = stock_images(name, again, PROMPTS, seen["z"], stock)
    assert (untrained - images).abs().max() > 1e-3
    assert (out / "pytorch_lora_weights.safetensors").is_file() == (lora > 0 and FAMILY[name].has_lora_files())
    if lora and FAMILY[name].has_lora_files():
        stock.load_lora_weights(out)
        torch.testing.assert_close(stock_images(name, again, PROMPTS, seen["z"], stock), images, atol=1e-5, rtol=0)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert any(row.get("norm_reward", 0) > 0 for row in rows)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("StableDiffusion3Pipeline", ["--timestep", 0], r"must be in 1\.\.1000"),
        ("StableDiffusion3Pipeline", ["--timestep", 1001], r"must be in 1\.\.1000"),
        ("FluxPipeline", ["--resolution", 34], "must be a multiple of 4"),
        ("schnell", ["--embedded_guidance", 3], "does not take guidance as an input"),
        ("SanaSprintPipeline", ["--cfg_scale", 4.5], "--cfg_scale 4.5: .* knows no ∅"),
        ("SanaSprintPipeline", ["--pretrain_steps", 1], "--pretrain_cfg_scale 1.5: .* knows no ∅"),
        ("StableDiffusion3Pipeline", ["--reference_lora", "/nowhere"], "--reference_lora /nowhere"),
    ],
)
def test_mistakes_before_weights(flow_args, name, options, message):
    with pytest.raises(Mistake, match=message):
        models_of(parse_args(flow_args(name, *options)))


def test_networks_that_predict_something_else(flow_args, models, tmp_path):
    """A family says of a config that it cannot be trained, before weights load."""
    shutil.copytree(models("HunyuanImagePipeline"), tmp_path / "distilled")
    config = tmp_path / "distilled" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_meanflow": True}))
    where = ["--pretrained_model_name_or_path", tmp_path / "distilled"]
    with pytest.raises(Mistake, match=r"distilled: its transformer predicts means over steps \(MeanFlow"):
        models_of(parse_args(flow_args("HunyuanImagePipeline", *where)))


def test_a_generator_of_another_family_and_a_distilled_one(flow_args, models):
    start = ["--pretrained_generator_name_or_path"]
    with pytest.raises(Mistake, match="does not fit|is a "):
        models_of(parse_args(flow_args("SanaPipeline", *start, models("SanaSprintPipeline"))))
    for path in (models("ZImagePipeline"), models("ZImagePipeline") + "/transformer"):
        read = models_of(parse_args(flow_args("ZImagePipeline", *start, path)))
        assert (read.timestep, read.input_noise) == (1000, "unit")


def test_reference_lora_is_fused(flow_args, tmp_path):
    """The reference and the generator that starts as it are the network with its adapters, at the given scale."""
    _, loaded, stock, _ = load(flow_args("StableDiffusion3Pipeline"))
    network = add_lora(stock.transformer, "generator", 2, 4, loaded.family.lora_targets)
    for p in trained_parameters(network, "generator").values():
        torch.nn.init.normal_(p, std=0.3)
    save_lora(tmp_path / "lora", loaded.family, network)
    expected = {s: merged_at(network, s) for s in (1.0, 0.5)}
    for scale, option in ((1.0, str(tmp_path / "lora")), (0.5, f"{tmp_path / 'lora'}:0.5")):
        _, _, stock, pipe = load(flow_args("StableDiffusion3Pipeline", "--reference_lora", option))
        for state in (stock.transformer.state_dict(), pipe.transformer.state_dict()):
            assert state.keys() == expected[scale].keys()
            for key, value in expected[scale].items():
                torch.testing.assert_close(state[key], value, atol=1e-5, rtol=0)


def test_reference_lora_that_peft_wrote_acts_at_full_strength(flow_args, tmp_path):
    """Its α stands in adapter_config.json alone; FLUX.2 klein is fused at half strength by names only."""
    command = flow_args("Flux2KleinPipeline")
    _, loaded, stock, _ = load(command)
    plain = copy.deepcopy(stock.transformer)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    adapted = get_peft_model(stock.transformer, config)
    adapted.save_pretrained(tmp_path / "peft")
    expected = adapted.merge_and_unload().state_dict()
    _, _, stock, _ = load([*command, "--reference_lora", f"{tmp_path / 'peft'}:0.5"])
    moved = 0
    for key, value in stock.transformer.state_dict().items():
        half = (plain.state_dict()[key] + expected[key]) / 2
        torch.testing.assert_close(value, half, atol=1e-5, rtol=0)
        moved += not torch.equal(value, plain.state_dict()[key])
    assert moved == 2
    with pytest.raises(
        Mistake, match="is not for the transformer of a StableDiffusion3Pipeline: its transformer_blocks.0"
    ):
        models_of(parse_args(flow_args("StableDiffusion3Pipeline", "--reference_lora", tmp_path / "peft")))


def test_sd3_without_its_t5(flow_args, models, tmp_path):
    """As many people keep it: the stock pipeline's picture, and an export without it."""
    stock = StableDiffusion3Pipeline.from_pretrained(
        models("StableDiffusion3Pipeline"), text_encoder_3=None, tokenizer_3=None
    )
    stock.save_pretrained(tmp_path / "small")
    command = [*flow_args("StableDiffusion3Pipeline"), "--pretrained_model_name_or_path", tmp_path / "small"]
    *_, pipe = load(command)
    z = noise(pipe, len(PROMPTS))
    images = ours(pipe, PROMPTS, z)
    torch.testing.assert_close(images, stock_images("StableDiffusion3Pipeline", pipe, PROMPTS, z), atol=1e-5, rtol=0)
    pipe.save_pretrained(tmp_path / "export")
    again = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    torch.testing.assert_close(again(PROMPTS, latents=z, output_type="pt", **SIZE).images, images, atol=1e-5, rtol=0)


def merged_at(network, scale):
    """The merged weights with the adapters scaled."""
    base = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items() if ".lora_" not in k}
    return {k: base[k] + scale * (v() - base[k]) for k, v in merged(network, "generator").items()}


def test_the_evaluation_draws_one_and_many_steps(flow_args, models, tiny_pocket, tmp_path):
    """An export of its own t* beside the reference with its own sampler, through the evaluation's command line."""
    *_, pipe = load(flow_args("StableDiffusion3Pipeline"))
    pipe.save_pretrained(tmp_path / "export")
    (tmp_path / "prompts.txt").write_text("a red apple\nblue cat\n")
    entries = [f"mine={tmp_path / 'export'}", f"ref={models('StableDiffusion3Pipeline')},steps=3,guidance=2"]
    words = ["--models", *entries, "--prompts", tmp_path / "prompts.txt", "--rewards", "pocket", "--num_images", 2,
             "--reward_checkpoint", f"pocket={tiny_pocket / 'scorer'}", "--resolution", SIDE,
             "--output_dir", tmp_path / "evaluation"]  # fmt: skip
    evaluation.main(evaluation.build_parser().parse_args([str(w) for w in words]))
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    figures = {name: model["figures"]["pocket"]["mean"] for name, model in result["models"].items()}
    assert set(figures) == {"mine", "ref"} and figures["mine"] != figures["ref"]


def test_an_export_with_the_code_of_version_0_1_loads(tiny_args, tmp_path):
    """One file with all families; its `model_index.json` may name neither a third text encoder nor a family."""
    *_, pipe = load(tiny_args)
    pipe.save_pretrained(tmp_path / "old")
    shutil.copyfile(Path(__file__).parent / "data" / "pipeline_0_1.py", tmp_path / "old" / "pipeline_one_step.py")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    for key in ("tokenizer_3", "text_encoder_3", "family", "input_noise", "embedded_guidance"):
        del index[key]
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    old = DiffusionPipeline.from_pretrained(tmp_path / "old", trust_remote_code=True)
    assert (old.config.family, old.config.input_noise) == ("PixArtAlphaPipeline", "unit")
    z = noise_of(old)
    images = [p(PROMPTS[:1], latents=z, output_type="pt").images for p in (old, pipe)]
    assert torch.equal(*images)


def noise_of(pipe):
    return torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
