"""Edges of a run: engines, warm-ups, what is logged, what ships from bfloat16, what the Hub is asked and when."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file

from diff_instruct.evaluation.judge import Judge
from diff_instruct.export import card, export
from diff_instruct.mistake import Mistake
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.training import set_up
from diff_instruct.training.history import TIMINGS
from diff_instruct.training.steps import GeneratorStep
from pipeline_one_step import OneStepPipeline, Schedule
from tests.runs import checkpoints, history, load, run, same, trained, weights
from tests.tiny import PROMPTS, tiny_sdxl


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported: take FSDP2"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP1 is not supported: set `fsdp_version: 2`"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision fp16 is not supported"),
    ],
)
def test_engines_that_the_script_does_not_do(tiny_args, tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(Mistake, match=message):
        run(tiny_args)
    assert not list(tmp_path.glob("out/*"))


def test_a_bug_is_no_mistake(tiny_args, monkeypatch):
    """The last lines of the script catch mistakes alone: a `ValueError` of a library keeps its traceback."""
    monkeypatch.setattr(GeneratorStep, "__call__", lambda *args: [].index(0))
    with pytest.raises(ValueError) as error:
        run(tiny_args)
    assert not isinstance(error.value, Mistake)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_warm_up_of_the_ta_is_in_its_own_schedule(tiny_args, tmp_path, schedule):
    """3 steps of warm-up, then 2 iterations of 2: the learning rate of step i of 7, and it ends at its end."""
    options = ["--ta_warmup_steps", 3, "--ta_steps", 2, "--max_train_steps", 2, "--lr_scheduler", schedule]
    run([*tiny_args, *options])
    rates = [row["ta_learning_rate"] for row in history(tmp_path / "out") if "ta_loss" in row]
    of = {"linear": lambda x: 1 - x, "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x))}[schedule]
    assert rates == pytest.approx([1e-3 * of(i / 7) for i in (1, 2, 3, 5, 7)], abs=1e-12)
    steps = [row["step"] for row in history(tmp_path / "out") if "ta_loss" in row]
    assert steps == [-2, -1, 0, 1, 2]


def test_a_warm_up_is_resumed(tiny_args, tmp_path, monkeypatch):
    """Killed in the third of four steps of warm-up, after checkpoint-0 was written at the second."""
    options = [*tiny_args, "--ta_warmup_steps", 4, "--max_train_steps", 2]
    run([*options, "--output_dir", tmp_path / "whole"])
    calls, loss = [], Denoiser.loss

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as m:
        m.setattr(Denoiser, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run([*options, "--output_dir", tmp_path / "killed"])
    assert checkpoints(tmp_path / "killed") == ["checkpoint-0"]
    run([*options, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert history(tmp_path / "whole") == history(tmp_path / "killed")


def test_latest_without_a_checkpoint_starts_afresh(tiny_args, tmp_path, capsys):
    run([*tiny_args, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"])
    assert "There is no checkpoint in" in capsys.readouterr().out
    assert checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]  # the last step has one, too


def test_figures_are_means_over_the_micro_batches(tiny_args, tmp_path):
    """The first step's: of one pass over 4 images, and of two over 2. And nothing that was not measured."""
    common = [*tiny_args, "--max_train_steps", 1, "--validation_steps", 0]
    run([*common, "--train_batch_size", 4, "--output_dir", tmp_path / "one"])
    run([*common, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "two"])
    (_, one), (_, two) = (history(tmp_path / name) for name in ("one", "two"))
    for key in ("ta_loss", "reward", "norm_reward", "norm_divergence", "norm_cfg", "x0_mean", "grad_norm_generator"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
    assert one["grad_norm_ta"] > 0
    row = json.loads((tmp_path / "two" / "history.jsonl").read_text().splitlines()[-1])
    assert all(row[key] > 0 for key in TIMINGS)
    run([*common, "--reward_scale", 0, "--output_dir", tmp_path / "none"])
    assert not {"reward", "norm_reward"} & history(tmp_path / "none")[-1].keys()


def test_bfloat16_ships_frozen_parts_as_they_were_published(tiny_args, tiny_model, tmp_path):
    run([*tiny_args, "--max_train_steps", 1, "--mixed_precision", "bf16"])
    for part, file in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        published, shipped = (load_file(f"{folder}/{part}/{file}") for folder in (tiny_model, tmp_path / "out"))
        assert same(published, shipped)


@pytest.mark.parametrize("lora", [0, 2])
def test_trained_and_shipped_agree_in_bfloat16(tiny_args, tmp_path, monkeypatch, lora):
    """The picture that training drew, and that of the export in bfloat16: apart by bfloat16's rounding."""
    drawn, judge_call = {}, Judge.__call__

    def judged(self, *args):
        scores, pictures = judge_call(self, *args)
        drawn["pictures"], drawn["noise"], drawn["prompts"] = pictures, self.noise, self.pictures
        return scores, pictures

    monkeypatch.setattr(Judge, "__call__", judged)
    run([*tiny_args, "--max_train_steps", 2, "--mixed_precision", "bf16", "--lora_rank", lora])
    shipped = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    images = shipped(drawn["prompts"], latents=drawn["noise"], output_type="pt").images
    assert drawn["pictures"].std() > 0.03
    assert (images - drawn["pictures"]).abs().mean() < 0.01


def test_another_vae(tiny_args, tiny_model, tmp_path):
    """`--pretrained_vae_model_name_or_path` is what decodes and ships; one with other latents is named."""
    vae = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.25
    vae.save_pretrained(tmp_path / "vae")
    *_, pipe = load([*tiny_args, "--pretrained_vae_model_name_or_path", tmp_path / "vae"])
    assert torch.equal(pipe.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    AutoencoderKL(latent_channels=2, norm_num_groups=32).save_pretrained(tmp_path / "other")
    for path, message in ((tmp_path / "other", "has other latents than"), (tmp_path / "nowhere", "no config.json")):
        with pytest.raises(Mistake, match=message):
            load([*tiny_args, "--pretrained_vae_model_name_or_path", path])


def test_the_hub_is_asked_first_and_a_failed_upload_is_told(tiny_args, tmp_path, monkeypatch, capsys):
    order, load_actors = [], set_up.load_actors
    monkeypatch.setattr(set_up, "load_actors", lambda *args: (order.append("load"), load_actors(*args))[1])
    monkeypatch.setattr(
        export, "create_repo",
        lambda name, private, **_: (order.append(("create", private)), type("Repo", (), {"repo_id": f"me/{name}"}))[1],
    )  # fmt: skip

    def broken(**options):
        order.append("upload")
        raise OSError("connection reset\nmore")

    monkeypatch.setattr(export, "upload_folder", broken)
    monkeypatch.setattr(export, "WAITS", (0,))
    run([*tiny_args, "--max_train_steps", 1, "--push_to_hub", "--hub_private_repo", "--hub_model_id", "apples"])
    assert order == [("create", True), "load", "upload", "upload"]
    out = capsys.readouterr().out
    assert "The upload failed (connection reset)" in out and "hf upload me/apples" in out

    def refused(*args, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(export, "create_repo", refused)
    with pytest.raises(Mistake, match="--push_to_hub: apples cannot be created on the Hub: 401"):
        run([*tiny_args, "--push_to_hub", "--hub_model_id", "apples", "--output_dir", tmp_path / "second"])
    assert order.count("load") == 1


def test_a_licence_that_cannot_be_asked_for(monkeypatch, capsys):
    def offline(*args):
        raise OSError("offline")

    monkeypatch.setattr(card, "model_info", offline)
    assert card.base_license("some/model") == {}
    assert "The licence of some/model could not be asked for (offline)" in capsys.readouterr().out


def test_scaled_noise(tiny_args, tmp_path):
    """σ_t z enters instead of z: it says so in the config, and a generator of the other kind is refused."""
    unit, scaled = (load([*tiny_args, "--input_noise", kind])[-1] for kind in ("unit", "scaled"))
    z, c = torch.randn(2, 4, 8, 8), unit.encode_prompt(PROMPTS[:2])
    _, sigma = Schedule(unit.scheduler)(torch.tensor([400, 400]))
    with torch.no_grad():
        assert torch.equal(scaled.generate(scaled.denoiser, z, c), unit.generate(unit.denoiser, sigma * z, c))
    scaled.save_pretrained(tmp_path / "scaled")
    shipped = DiffusionPipeline.from_pretrained(tmp_path / "scaled", trust_remote_code=True)
    with torch.no_grad():
        same_images = shipped(PROMPTS[:2], latents=z, output_type="latent").images
        torch.testing.assert_close(same_images, scaled.generate(scaled.denoiser, z, c), atol=1e-5, rtol=0)
    start = [*tiny_args, "--pretrained_generator_name_or_path", tmp_path / "scaled"]
    assert load(start)[-1].config.input_noise == "scaled"
    with pytest.raises(Mistake, match="was trained with --input_noise scaled"):
        load([*start, "--input_noise", "unit"])


def test_pixart_at_1024_pixels_is_conditioned_on_the_size(tiny_args, tiny_model, tmp_path):
    """A network with `sample_size` 128 takes resolution and aspect ratio: the stock pipeline gives the same image."""
    stock = PixArtAlphaPipeline.from_pretrained(tiny_model)
    options = {**stock.transformer.config, "sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24}
    torch.manual_seed(0)
    stock.transformer = PixArtTransformer2DModel.from_config(options).eval()
    for p in stock.transformer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    stock.register_modules(transformer=stock.transformer)
    stock.save_pretrained(tmp_path / "large")
    *_, pipe = load([*tiny_args, "--pretrained_model_name_or_path", tmp_path / "large"])
    z = torch.randn(2, 4, 8, 16)
    call = {"latents": z, "height": 16, "width": 32, "output_type": "pt"}
    ours = pipe(PROMPTS[:2], **call).images
    stock = PixArtAlphaPipeline.from_pipe(pipe, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    theirs = stock(
        PROMPTS[:2], num_inference_steps=1, timesteps=[400], guidance_scale=1.0, use_resolution_binning=False, **call
    ).images
    assert ours.std() > 0.03
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_half_precision_vae_is_as_it_was_after_decoding(tmp_path):
    """SDXL's overflows in half precision, so it decodes in full; then it is half the size again."""
    stock = DiffusionPipeline.from_pretrained(tiny_sdxl(tmp_path / "model"))
    stock.vae.register_to_config(force_upcast=True)
    parts = {**dict.fromkeys(OneStepPipeline._optional_components), **stock.components}
    names = {"vae", "scheduler", *OneStepPipeline._optional_components}
    parts = {k: v for k, v in parts.items() if k in names}
    pipe = OneStepPipeline(**parts, family="StableDiffusionXLPipeline", timestep=399)
    pipe.vae.half()
    x0 = torch.randn(1, 4, 8, 8)
    half = pipe.decode(x0)
    assert pipe.vae.dtype == torch.float16
    torch.testing.assert_close(half, pipe.decode(x0))
    torch.testing.assert_close(half, OneStepPipeline.decode(pipe, x0.clone()), atol=1e-6, rtol=0)


def test_the_average_changes_places_and_comes_back(tiny_args, tmp_path):
    """While it is judged nothing is copied: the tensors are exchanged, and training goes on with its own."""
    run([*tiny_args, "--max_train_steps", 2, "--validation_steps", 1, "--output_dir", tmp_path / "judged"])
    run([*tiny_args, "--max_train_steps", 2, "--validation_steps", 0, "--output_dir", tmp_path / "plain"])
    for name in ("generator", "teaching_assistant"):
        assert same(trained(tmp_path / "judged", 2, name), trained(tmp_path / "plain", 2, name))
