"""Generators of several steps: what is trained, exported and run in the stock pipeline is one and the same."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diff_instruct.export.card import stock_call
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.prompts.stream import Sampler
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import OneStepPipeline
from tests.runs import history, load, run, same, watch_actors, watch_export, weights
from tests.tiny import PROMPTS, tiny_pixart, tiny_sd, tiny_sd2, tiny_sdxl


ROOT = Path(__file__).resolve().parents[1]
PREPARE = {"pixart": tiny_pixart, "sd": tiny_sd, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family to the folder of its tiny pipeline."""
    return {name: prepare(tmp_path_factory.mktemp(name)) for name, prepare in PREPARE.items()}


@pytest.fixture
def short_args(tiny_args, models):
    """Arguments of a short run for a family."""
    few = "--num_eval_prompts 1 --validation_steps 0 --checkpointing_steps 0 --max_train_steps 2 --validation_prompts"
    few = [*few.split(), *PROMPTS[:2], "--report_to", "none"]
    return lambda family, *options: [
        *tiny_args, "--pretrained_model_name_or_path", models[family], *few, *map(str, options)
    ]  # fmt: skip


def make(command):
    """The generator's pipeline, before training."""
    return load(command)[-1]


@pytest.fixture
def pipe(short_args):
    """PixArt's tiny generator with three steps."""
    return make(short_args("pixart", "--generator_steps", 3))


def draws(n, b=3, seed=0):
    """z, and the noise of n − 1 further steps, in the order in which a pipeline draws them."""
    rng = torch.Generator().manual_seed(seed)
    z, *noise = (torch.randn(b, 4, 8, 8, generator=rng) for _ in range(n))
    return z, noise


def both_images(shipped, family, prompts):
    """What `__call__` gives, then the stock pipeline as the model card says, from the same torch generator."""
    scope, how = {"pipe": shipped}, {"guidance_scale": 0.0, "height": 16, "width": 16}
    exec(stock_call(shipped, PROMPTS[0]), scope)
    if family == "pixart":
        how.update(guidance_scale=1.0, use_resolution_binning=False, clean_caption=False)
    how.update(num_inference_steps=len(shipped.timesteps), timesteps=shipped.timesteps)
    for network, options in ((shipped, {}), (scope["stock"], how)):
        rng = torch.Generator().manual_seed(0)
        yield network(prompts, generator=rng, output_type="pt", **options).images


@pytest.mark.parametrize(
    "family, options, timesteps",
    [
        ("pixart", ["--generator_steps", 4], [400, 300, 200, 100]),
        ("pixart", ["--timestep", 999, "--generator_steps", 4], [999, 749, 499, 249]),
        ("sd", ["--generator_steps", 2], [625, 312]),
        ("sd", ["--timestep", 999, "--generator_steps", 4], [999, 749, 499, 249]),
        ("sd2", ["--timestep", 900, 700, 20], [900, 700, 20]),
        ("sdxl", ["--generator_steps", 4], [399, 299, 199, 99]),
    ],
)
def test_exported_and_stock_give_the_same_images(short_args, tmp_path, family, options, timesteps):
    """For a batch of prompts with an empty one: max abs difference to `generate` ≤ 1e-5."""
    pipe, prompts = make(short_args(family, *options)), [*PROMPTS[:2], ""]
    z, noise = draws(len(timesteps))
    with torch.no_grad():
        latents = pipe.generate(pipe.denoiser, z, Conditioning(pipe.encode_prompt, "cpu")(prompts), noise)
        expected = pipe.decode(latents).clamp(0, 1)
    pipe.save_pretrained(tmp_path / "first")
    shipped = DiffusionPipeline.from_pretrained(tmp_path / "first", trust_remote_code=True)
    shipped.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config.timestep == again.timesteps == timesteps
    for images in both_images(again, family, prompts):
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    other = shipped(prompts, latents=z, generator=torch.Generator().manual_seed(9), output_type="pt").images
    assert expected.std() > 0.03 and (other - expected).abs().max() > 1e-3  # the further noise matters


@pytest.mark.parametrize(
    "family, options, timesteps", [("pixart", [], [400, 200]), ("sd", ["--lora_rank", 2], [625, 312])]
)
def test_trained_exported_and_stock_give_the_same_images(
    short_args, tmp_path, monkeypatch, family, options, timesteps
):
    """The same after training; and the model card says so."""
    seen, prompts = {}, [*PROMPTS[:2], ""]
    z, noise = draws(2)

    def exported(pipe):
        with torch.no_grad():
            c = Conditioning(pipe.encode_prompt, "cpu")(prompts)
            seen["trained"] = pipe.decode(seen["generator"].generate(z, c, noise)).clamp(0, 1)

    watch_actors(monkeypatch, lambda actors: seen.update(generator=actors.generator))
    watch_export(monkeypatch, exported)
    run(short_args(family, "--generator_steps", 2, *options))
    shipped = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert shipped.timesteps == timesteps
    for images in both_images(shipped, family, prompts):
        torch.testing.assert_close(images, seen["trained"], atol=1e-5, rtol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"at each of the timesteps {timesteps[0]}, {timesteps[1]}," in card and "{%" not in card
    assert stock_call(shipped, PROMPTS[0]) in card


def test_one_step_is_what_it_was(pipe):
    """One evaluation at t*, whether t* is given as a number or as a list of one."""
    z, _ = draws(1)
    c = pipe.encode_prompt(PROMPTS[:3])
    for timestep in (400, [400]):
        one = OneStepPipeline(**pipe.components, family=pipe.config.family, timestep=timestep)
        with torch.no_grad():
            output = one.denoise(one.transformer, z, torch.full((3,), 400), c)
            alpha_bar = one.scheduler.alphas_cumprod[400]
            x0 = (z - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
            assert torch.equal(one.generate(one.transformer, z, c), x0)


def test_the_random_stream_of_one_step_is_a_part_of_that_of_several():
    one, several = (Sampler(iter(["a"] * 9), [(4, 8, 8)], 3, 5, steps=n)() for n in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(one[1:4], several[1:4]))
    assert one[4].shape == (0, 3, 4, 8, 8) and (one[5] == 0).all() and several[4].shape == (3, 3, 4, 8, 8)
    _, z, eps, _, noise, step, *_ = Sampler(iter(["a"] * 4000), [(1, 1, 1)], 4000, 5, steps=4)()
    assert torch.bincount(step, minlength=4).min() > 900
    every = torch.stack([z, eps, *noise]).flatten(1)
    assert (every.corrcoef() - torch.eye(5)).abs().max() < 0.07


def test_two_processes_draw_the_further_steps_that_one_draws():
    def drawn(rank, world, batch):
        sampler = Sampler(iter("a" * 99), [(1, 2, 2)], batch, 5, rank, world, steps=3)
        sampler()
        return sampler()[4:6]

    noise, step = drawn(0, 1, 8)
    for rank in range(2):
        share = drawn(rank, 2, 4)
        assert torch.equal(share[0], noise[:, rank::2]) and torch.equal(share[1], step[rank::2])


def test_each_sample_returns_its_own_step(pipe):
    """A mixed batch, against shorter generators, sample by sample."""
    z, noise = draws(3, b=5)
    c, step = pipe.encode_prompt(PROMPTS[:5]), torch.tensor([2, 0, 1, 2, 1])
    with torch.no_grad():
        mixed = pipe.generate(pipe.transformer, z, c, noise, step)
        for i, k in enumerate(step.tolist()):
            shorter = OneStepPipeline(**pipe.components, family=pipe.config.family, timestep=pipe.timesteps[: k + 1])
            row = slice(i, i + 1)
            alone = shorter.generate(
                pipe.transformer, z[row], {k: v[row] for k, v in c.items()}, [eps[row] for eps in noise[:k]]
            )
            torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-4)
        last = pipe.generate(pipe.transformer, z, c, noise)
    assert torch.equal(last[step == 2], mixed[step == 2]) and not torch.equal(last[step < 2], mixed[step < 2])


def test_a_drawn_step_is_exact_in_expectation(pipe):
    """E_k ∇L(x0 of step k), k uniform, is the gradient of the mean over all n states, each with the states before it
    held fixed; and a batch takes no step that none of its samples goes as far as."""
    z, noise = draws(3, b=1)
    c, network, calls = pipe.encode_prompt(PROMPTS[:1]), pipe.transformer, []
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    parameters, target = list(network.parameters()), draws(1, b=1, seed=3)[0]

    def gradient(step, z, c, noise):
        loss = (pipe.generate(network, z, c, noise, step) - target).square().sum() / len(step)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    mean = sum(gradient(torch.tensor([k]), z, c, noise) for k in range(3)) / 3
    handle.remove()
    z, *noise = (v.expand(3, *v.shape[1:]) for v in (z, *noise))
    whole = gradient(torch.arange(3), z, {k: v.expand(3, *v.shape[1:]) for k, v in c.items()}, noise)
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    assert len(calls) == 1 + 2 + 3


def test_gradient_flows_through_the_own_step_alone(pipe):
    """Against a single evaluation at the inputs that a sample's last step had; the steps before build no graph."""
    z, noise = draws(3)
    c, step, network, inputs = pipe.encode_prompt(PROMPTS[:3]), torch.tensor([0, 1, 2]), pipe.transformer, []
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0].detach(), kwargs["timestep"], torch.is_grad_enabled())),
        with_kwargs=True,
    )
    cotangent = draws(1, seed=3)[0]
    x0 = pipe.generate(network, z, c, noise, step)
    handle.remove()
    assert [enabled for *_, enabled in inputs] == [False, False, True]
    x_t, t, _ = inputs[-1]
    assert t.tolist() == pipe.timesteps and torch.equal(x_t[0], z[0]) and not torch.equal(x_t[1], z[1])
    gradient = torch.autograd.grad(x0, list(network.parameters()), cotangent, allow_unused=True)
    expected = torch.autograd.grad(
        pipe.estimate(network, x_t, t, c), list(network.parameters()), cotangent, allow_unused=True
    )
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected) if b is not None)
    assert sum(g.abs().sum() for g in gradient if g is not None) > 0


class Exact(torch.nn.Module):
    """A transformer that predicts E[x0 | x_t] for x0 ~ N(mean, var)."""

    def __init__(self, schedule, mean, var):
        super().__init__()
        self.alphas_cumprod, self.mean, self.var = schedule.alphas_cumprod, mean, var
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def gain(self, t):
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar.sqrt() * self.var / (alpha_bar * self.var + 1 - alpha_bar)

    def forward(self, x_t, timestep, **_):
        t = timestep.view(-1, 1, 1, 1)
        return (self.mean + self.gain(t) * (x_t - self.alphas_cumprod[t].sqrt() * self.mean),)


@pytest.mark.parametrize("timesteps", [[400, 300, 200, 100], [999, 749, 499, 249]])
def test_steps_of_an_exact_denoiser_approach_the_reference_s_law(pipe, timesteps):
    """Gaussian world: mean and variance of x0 after each step in closed form; each step lowers KL to N(mean, var)."""
    mean, var, n = 0.8, 0.6, 4000
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    exact = OneStepPipeline(
        **{**pipe.components, "scheduler": scheduler}, family=pipe.config.family, timestep=timesteps
    )
    network = Exact(scheduler, mean, var)
    z, noise = draws(4, b=n)
    c = {"encoder_hidden_states": torch.zeros(n, 1, 1), "encoder_attention_mask": torch.ones(n, 1)}
    step = torch.arange(n) % 4
    x0 = exact.generate(network, z, c, noise, step).detach()

    m, v, distances = 0.0, 1.0, []  # of x_{t_1} = z
    for k, t in enumerate(timesteps):
        alpha_bar, gain = scheduler.alphas_cumprod[t].item(), network.gain(t).item()
        if k > 0:
            m, v = alpha_bar**0.5 * m, alpha_bar * v + 1 - alpha_bar
        m, v = mean + gain * (m - alpha_bar**0.5 * mean), gain**2 * v
        x, count = x0[step == k], (n // 4) * 256
        assert abs(x.mean().item() - m) < 5 * (v / count) ** 0.5
        assert x.var().item() == pytest.approx(v, rel=5 * (2 / count) ** 0.5)
        distances.append(0.5 * (v / var + (m - mean) ** 2 / var - 1 - torch.tensor(v / var).log().item()))
    assert all(later < 0.9 * d for d, later in zip(distances, distances[1:]))


def test_continued_equals_never_stopped_and_brings_its_timesteps(short_args, tmp_path):
    several = short_args("pixart", "--generator_steps", 2, "--max_train_steps", 3, "--checkpointing_steps", 2)
    run([*several, "--output_dir", tmp_path / "whole"])
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run([*several, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", checkpoint])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    rows = [history(tmp_path / name)[-1] for name in ("whole", "out")]
    assert rows[0] == rows[1] and rows[1]["step"] == 3
    summaries = [json.loads((tmp_path / n / "training_summary.json").read_text()) for n in ("whole", "out")]
    assert summaries[0]["heldout_after"] == summaries[1]["heldout_after"] != summaries[1]["heldout_before"]

    start = [*short_args("pixart"), "--pretrained_generator_name_or_path", str(tmp_path / "whole")]
    start += ["--output_dir", str(tmp_path / "next")]
    for more in ([], ["--generator_steps", "2"], ["--timestep", "400", "200"]):
        assert models_of(parse_args([*start, *more])).timestep == [400, 200]
    for more in (["--generator_steps", "1"], ["--timestep", "400"], ["--timestep", "400", "100"]):
        with pytest.raises(ValueError, match=r"was trained at t\* = 400 200: give the same --timestep"):
            models_of(parse_args([*start, *more]))


def test_a_one_step_generator_can_go_on_with_more_steps(short_args, tmp_path):
    make(short_args("pixart", "--timestep", 300)).save_pretrained(tmp_path / "one")
    start = [*short_args("pixart"), "--pretrained_generator_name_or_path", str(tmp_path / "one")]
    assert models_of(parse_args(start)).timestep == 300
    assert models_of(parse_args([*start, "--generator_steps", "3"])).timestep == [300, 200, 100]
    assert models_of(parse_args([*start, "--timestep", "300", "50"])).timestep == [300, 50]
    with pytest.raises(ValueError, match=r"was trained at t\* = 300"):
        models_of(parse_args([*start, "--timestep", "400", "--generator_steps", "3"]))


def test_bfloat16_and_checkpointing_train_every_weight(short_args, models, tmp_path, monkeypatch):
    """The passes without gradient leave nothing behind, in autocast's cache or elsewhere, that cuts the last one.

    Until torch 2.10 that cache did; later ones keep casts with and without gradient apart, so it is looked at, too."""
    cached = []

    def look(actors):
        for actor in actors.cast.values():
            actor.network.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))

    watch_actors(monkeypatch, look)
    options = ["--generator_steps", 3, "--mixed_precision", "bf16", "--gradient_checkpointing", "--no-use_ema"]
    run(short_args("pixart", *options))
    assert cached and not any(cached)
    before = load_file(f"{models['pixart']}/transformer/diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "out")
    assert after.keys() == before.keys() and all(not torch.equal(after[k], before[k]) for k in after)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--generator_steps", 0], "--generator_steps must be a whole number from 1 to 8"),
        (["--generator_steps", 9], "--generator_steps must be a whole number from 1 to 8"),
        (["--timestep", 400, 400], "--timestep 400 400 must descend"),
        (["--timestep", 200, 400], "--timestep 200 400 must descend"),
        (["--timestep", 400, 200, "--generator_steps", 3], "400 200 are 2 steps, but --generator_steps is 3"),
        (["--timestep", 400, 200, "--generator_steps", 1], "400 200 are 2 steps, but --generator_steps is 1"),
        (["--timestep", *range(9, 0, -1)], "9 8 7 6 5 4 3 2 1 are 9 steps, but the generator takes at most 8"),
        (["--timestep", 1000, 500], r"--timestep 1000 500 is outside the schedule of .*: t\* must be in 0\.\.999"),
        (["--timestep", 2, "--generator_steps", 4], "--timestep 2 is too low for 4 steps: 2 1 1 0"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(tiny_args, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        run([*tiny_args, *options])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "timestep, message",
    [([400, 400], "must descend"), ([100, 400], "must descend"), ([1000, 1], r"t\*"), ([], r"t\*"), ([9, -1], r"t\*")],
)
def test_the_pipeline_s_own_mistakes(pipe, timestep, message):
    with pytest.raises(ValueError, match=message):
        OneStepPipeline(**pipe.components, family=pipe.config.family, timestep=timestep)


def test_forgotten_noise_is_named(pipe):
    z, noise = draws(3)
    with pytest.raises(ValueError, match=r"takes 2 further step\(s\), but has `noise` for 0"):
        pipe.generate(pipe.transformer, z, pipe.encode_prompt(PROMPTS[:3]))


def test_published_grids():
    """Those of docs/methods.md are what diffusers' schedulers make of the published settings."""
    rows = re.findall(r"^\| (.+) \| (\d+(?: \d+){3,7}) \|$", (ROOT / "docs" / "methods.md").read_text(), re.M)
    named = {model: [int(t) for t in grid.split()] for model, grid in rows}
    lightning = EulerDiscreteScheduler(timestep_spacing="trailing")
    lightning.set_timesteps(4)
    assert len(rows) == 4 and named.pop(rows[0][0]) == lightning.timesteps.int().tolist()
    for model, grid in named.items():
        shift = 1.15 if "e^1.15" in model else math.log(3)
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
        flow.set_timesteps(sigmas=[1 - k / len(grid) for k in range(len(grid))], mu=shift)
        assert grid == flow.timesteps.round().int().tolist(), model
