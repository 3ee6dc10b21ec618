"""The pipeline is the generator: training's forward, the exported folder and the stock pipeline give one image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline

from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import OneStepPipeline
from tests.tiny import PROMPTS


@pytest.fixture(scope="module")
def pipe(tiny_model):
    stock = PixArtAlphaPipeline.from_pretrained(tiny_model)
    scheduler = DDPMScheduler.from_config(stock.scheduler.config, clip_sample=False, variance_type="fixed_small")
    parts = dict.fromkeys(OneStepPipeline._optional_components)
    return OneStepPipeline(
        **{**parts, **stock.components, "scheduler": scheduler}, family="PixArtAlphaPipeline", timestep=400
    )


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    pipe.save_pretrained(folder)
    return str(folder)


def load(folder):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def noise(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_training_exported_and_stock_give_the_same_images(pipe, exported):
    """Prompts of different lengths, an empty one among them, in one batch; max abs difference ≤ 1e-5."""
    prompts, z = [*PROMPTS, ""], noise(len(PROMPTS) + 1)
    with torch.no_grad():
        trained = pipe.decode(pipe.generate(pipe.transformer, z, Conditioning(pipe.encode_prompt, "cpu")(prompts)))
    trained = trained.clamp(0, 1)
    loaded = load(exported)
    shipped = loaded(prompts, latents=z, output_type="pt").images
    stock = PixArtAlphaPipeline.from_pipe(loaded)(
        prompts, latents=z, num_inference_steps=1, timesteps=[400], guidance_scale=1.0, height=16, width=16,
        use_resolution_binning=False, clean_caption=False, output_type="pt",
    ).images  # fmt: skip
    assert trained.std() > 0.05
    torch.testing.assert_close(shipped, trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(stock, trained, atol=1e-5, rtol=0)


def test_one_empty_prompt_leaves_the_others_conditional(pipe):
    c, z = Conditioning(pipe.encode_prompt, "cpu"), noise(1).repeat(3, 1, 1, 1)
    with torch.no_grad():
        mixed = pipe.generate(pipe.transformer, z, c(["a red apple", "", "blue cat"]))
        alone = [pipe.generate(pipe.transformer, z[:1], c([p]))[0] for p in ("a red apple", "", "blue cat")]
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-5, rtol=0)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3 and (mixed[0] - mixed[2]).abs().max() > 1e-3


def test_three_lines_in_another_process_and_directory(pipe, exported, tmp_path):
    code = (
        "from diffusers import DiffusionPipeline; import torch, sys\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "g = torch.Generator().manual_seed(3)\n"
        "pipe('a red apple', generator=g).images[0].save('apple.png')\n"
        "pipe.save_pretrained('again')\n"
        "again = DiffusionPipeline.from_pretrained('again', trust_remote_code=True)\n"
        "g = torch.Generator().manual_seed(3)\n"
        "again('a red apple', generator=g).images[0].save('again.png')\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code, exported], cwd=tmp_path, check=True, env=env, capture_output=True)
    image = pipe("a red apple", generator=torch.Generator().manual_seed(3)).images[0]
    from PIL import Image

    for name in ("apple.png", "again.png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(image))


def test_a_component_can_be_replaced(pipe, exported):
    with torch.no_grad():
        mine = type(pipe.transformer).from_config(pipe.transformer.config)
    loaded = DiffusionPipeline.from_pretrained(exported, transformer=mine, trust_remote_code=True)
    assert loaded.transformer is mine


def test_index_names_the_file_and_t_star(exported):
    index = json.loads((Path(exported) / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_one_step", "OneStepPipeline"] and index["timestep"] == 400


def test_call_options(pipe):
    many = pipe(
        PROMPTS[:2], num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert many.shape == (4, 16, 16, 3) and many.min() >= 0 and many.max() <= 1
    (latents,) = pipe("fire", output_type="latent", return_dict=False, latents=noise(1))
    assert latents.shape == (1, 4, 8, 8)
    c = pipe.encode_prompt(["fire"])
    embeds = {"prompt_embeds": c["encoder_hidden_states"], "prompt_attention_mask": c["encoder_attention_mask"]}
    again = pipe(**embeds, output_type="latent", latents=noise(1)).images
    torch.testing.assert_close(again, latents)
    assert pipe("fire", height=24, width=8, output_type="pt").images.shape == (1, 3, 24, 8)
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    assert len(pipe(PROMPTS[:2], generator=seeds).images) == 2


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": "fire", "height": 17}, "multiples of 4"),
        ({"prompt": "fire", "latents": torch.zeros(1, 4, 9, 9)}, "latents must have shape"),
        ({"prompt": "fire", "output_type": "jpg"}, "output_type must be"),
        ({"prompt_embeds": torch.zeros(1, 3, 16)}, "prompt_attention_mask"),
    ],
)
def test_mistakes_are_named(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


@pytest.mark.parametrize("timestep", [None, -1, 1000])
def test_t_star_must_be_in_the_schedule(pipe, timestep):
    with pytest.raises(ValueError, match="timestep t\\*"):
        OneStepPipeline(**pipe.components, family=pipe.config.family, timestep=timestep)


def test_push_to_hub_uploads_the_pipeline_and_nothing_else(tiny_args, tmp_path, monkeypatch, capsys):
    """At the boundary of huggingface_hub: what is uploaded loads, has its card, and holds no checkpoint or token."""
    from huggingface_hub import get_token

    from diff_instruct.export import export
    from train_diff_instruct_pp import main

    uploaded = {}

    def upload_folder(folder_path, allow_patterns, repo_id, token=None, **_):
        from huggingface_hub.utils import filter_repo_objects

        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = tmp_path / "hub" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((Path(folder_path) / name).read_bytes())
        uploaded.update(repo_id=repo_id, token=token)

    monkeypatch.setattr(export, "upload_folder", upload_folder)
    monkeypatch.setattr(export, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": f"me/{repo_id}"}))
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    words = [*tiny_args, "--hub_token", "hf_secret", "--push_to_hub", "--hub_model_id", "apples"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    args = parse_args()
    assert get_token() == "hf_secret" and "hf_secret" not in f"{args}{sys.argv}" and sys.argv[-1] == "apples"
    main(args)
    assert uploaded == {"repo_id": "me/apples", "token": None}  # so huggingface_hub takes HF_TOKEN
    hub = tmp_path / "hub"
    names = {p.name for p in hub.rglob("*")}
    assert {"model_index.json", "pipeline_one_step.py", "README.md", "samples.png", "training_summary.json"} <= names
    assert not any(n.startswith("checkpoint") or n.startswith("events") or n == "before.safetensors" for n in names)
    assert all(b"hf_secret" not in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert len(load(str(hub))("a red apple").images) == 1


def test_the_pipeline_s_own_push_to_hub(pipe, tmp_path, monkeypatch):
    """`pipe.push_to_hub`, as every diffusers pipeline has it: what arrives at huggingface_hub loads."""
    import shutil

    from diffusers.utils import hub_utils

    def upload_folder(repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    pipe.push_to_hub("me/apples")
    z = noise(1)
    pushed = load(str(tmp_path / "hub"))("a red apple", latents=z, output_type="pt").images
    torch.testing.assert_close(pushed, pipe("a red apple", latents=z, output_type="pt").images)
