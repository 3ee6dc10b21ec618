"""Weight files as people have them: of one variant only, without their contents, under other names."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, PixArtAlphaPipeline
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from diff_instruct.evaluation.candidates import Contender, check
from diff_instruct.mistake import Mistake
from diff_instruct.models import weight_files
from diff_instruct.models.configs import ModelSource
from diff_instruct.rewards import look
from diff_instruct.rewards.specs import RewardSpec
from pipeline_one_step import OneStepPipeline
from tests.runs import run


DENOISER = "transformer/diffusion_pytorch_model.safetensors"
PARTS = (DENOISER, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1234567\n"
START = ["--timestep", 400, "--input_noise", "unit", "--pretrained_generator_name_or_path"]


@pytest.fixture(scope="module")
def only_fp16(tiny_model, tmp_path_factory):
    """The tiny reference, all of it in files of the variant fp16."""
    folder = tmp_path_factory.mktemp("fp16")
    PixArtAlphaPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture
def copy(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def refused(arguments, *parts):
    """With `--dry_run` already, in one line with these parts."""
    with pytest.raises(Mistake) as error:
        run([*arguments, "--dry_run"])
    assert all(str(part) in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


def test_files_of_one_variant(quick_args, only_fp16, tmp_path):
    """Each of the models: refused with the flag that loads it; with it the run trains and exports in either dtype."""
    quick_args += ["--mixed_precision", "bf16"]
    vae = ["--pretrained_vae_model_name_or_path", only_fp16 / "vae"]
    reference = ["--pretrained_model_name_or_path", only_fp16]
    for words in (reference, [*START, only_fp16], [*START, only_fp16 / "transformer"], vae):
        refused([*quick_args, *words], only_fp16, "of the variant fp16 only: give --variant fp16")
    run([*quick_args, *reference, *vae, *START, only_fp16, "--max_train_steps", 1, "--variant", "fp16"])
    written = {part: load_file(tmp_path / "out" / part) for part in PARTS}
    for part, state in written.items():
        published = load_file(str(only_fp16 / part).replace(".safetensors", ".fp16.safetensors"))
        assert state.keys() == published.keys()
        if part != DENOISER:  # as they were published, not by way of bfloat16
            assert all(torch.equal(state[k].half(), published[k]) for k in state)


def test_plain_parts_beside_a_variant(quick_args, copy, tmp_path):
    """As diffusers does: the variant where it is, plain files elsewhere; a generator's plain files come first."""
    pipe = PixArtAlphaPipeline.from_pretrained(copy)
    pipe.transformer.to(torch.float16).save_pretrained(copy / "transformer", variant="fp16")
    source = ModelSource(str(copy), variant="fp16")
    assert weight_files.options(source, "transformer")["variant"] == "fp16"
    assert weight_files.options(source, "vae")["variant"] is None
    assert weight_files.options(source, "transformer", "plain")["variant"] is None
    words = ["--pretrained_model_name_or_path", copy, "--variant", "fp16", "--mixed_precision", "bf16"]
    run([*quick_args, *words, "--max_train_steps", 1])
    DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize(
    "files, found",
    [
        (["model.safetensors", "config.json", "model.onnx", "flax_model.msgpack"], {None}),
        (["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.non_ema.bin"], {"fp16", "non_ema"}),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], {None}),
        (["model.fp16-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bf16.bin"], {"fp16", "bf16"}),
        (["openvino_model.bin", "optimizer.bin", "my_model.safetensors"], set()),
    ],
)
def test_names(tmp_path, files, found):
    for name in files:
        (tmp_path / name).touch()
    assert set(weight_files.variants(ModelSource(str(tmp_path)))) == found


def test_of_the_hub_the_names_are_asked_for(monkeypatch):
    files = ["vae/diffusion_pytorch_model.fp16.safetensors", "unet/a/model.bin", "model_index.json"]
    monkeypatch.setattr(weight_files, "list_repo_files", lambda repo, revision: files)
    weight_files.files_on_hub.cache_clear()
    with pytest.raises(Mistake, match=r"^some/model/vae has weights of the variant fp16 only: give --variant fp16$"):
        weight_files.check_folder(ModelSource("some/model"), "vae")
    with pytest.raises(Mistake, match="some/model/unet has no weights"):
        weight_files.check_folder(ModelSource("some/model"), "unet")
    weight_files.files_on_hub.cache_clear()
    monkeypatch.undo()
    weight_files.check_folder(ModelSource("some/other"), "unet")  # offline: nobody can say


@pytest.mark.parametrize("part", PARTS)
def test_files_without_their_contents(quick_args, copy, part):
    """A clone without git-lfs, a download that broke off, and one of several files that is missing."""
    words = [*quick_args, "--pretrained_model_name_or_path", copy]
    whole = (copy / part).read_bytes()
    (copy / part).write_text(POINTER)
    refused(words, copy / part, "git lfs pull")
    (copy / part).write_bytes(whole[:-9])
    refused(words, copy / part, "is damaged")
    (copy / part).rename((copy / part).with_name(Path(part).stem + "-00001-of-00002.safetensors"))
    refused(words, "is incomplete: 1 of 2 files")
    shutil.rmtree((copy / part).parent)
    shutil.copytree(copy / "scheduler", (copy / part).parent)
    refused(words, copy)


def test_a_configuration_without_weights_tells_its_size_alone(quick_args, copy):
    for part in PARTS:
        (copy / part).unlink()
    words = [*quick_args, "--pretrained_model_name_or_path", copy]
    run([*words, "--dry_run"])
    with pytest.raises(Mistake, match="has no weights"):
        run(words)


def prefixed(state):
    return {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.tensor(1)}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("a.safetensors", prefixed, "every name begins with 'module.': save the weights without it"),
        ("a.bin", prefixed, "every name begins with 'module.'"),
        ("a.bin", lambda state: {"epoch": 3, "state_dict": state}, "under the key 'state_dict'"),
        ("a.bin", lambda state: {"model": state, "ema": state}, "under the key 'model' and 'ema'"),
        ("a.safetensors", lambda s: {"transformer.a.lora_A.weight": torch.zeros(2, 2)}, "it is a LoRA"),
        ("a.safetensors", lambda s: {"model.diffusion_model.a": torch.zeros(2)}, "`from_single_file`"),
        ("a.safetensors", lambda state: dict(list(state.items())[1:]), "1 of "),
        ("a.bin", lambda state: POINTER, "git lfs pull"),
    ],
)
def test_a_generator_s_file_that_does_not_fit_says_why(quick_args, tiny_model, tmp_path, name, change, message):
    state = change(load_file(Path(tiny_model) / DENOISER))
    file = tmp_path / "start" / name
    file.parent.mkdir()
    if isinstance(state, str):
        file.write_text(state)
    elif name.endswith(".bin"):
        torch.save(state, file)
    else:
        save_file(state, file)
    refused([*quick_args, *START, file], file, message)


def test_an_evaluation_names_its_own_option(only_fp16, tmp_path):
    """Of a reference, of an export and of a network in a base."""
    stock = PixArtAlphaPipeline.from_pretrained(only_fp16, variant="fp16")
    parts = {**dict.fromkeys(OneStepPipeline._optional_components), **stock.components}
    pipe = OneStepPipeline(**parts, timestep=400, family="PixArtAlphaPipeline")
    pipe.save_pretrained(tmp_path / "export", variant="fp16")
    for entry in (f"a={only_fp16},steps=2,guidance=1", f"a={tmp_path / 'export'}"):
        with pytest.raises(Mistake, match="give variant=fp16$"):
            check(Contender.parse(entry), None, None, False)
        check(Contender.parse(f"{entry},variant=fp16"), None, None, False)
    network = f"a={only_fp16 / 'transformer'},base={only_fp16},timestep=9,noise=unit"
    with pytest.raises(Mistake, match="give variant=fp16$"):
        check(Contender.parse(network), None, None, False)
    check(Contender.parse(f"{network},variant=fp16"), None, None, False)


def test_a_dry_run_looks_at_the_rewards(quick_args, tiny_pocket, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(tiny_pocket / "scorer", tmp_path / "scorer"))
    (folder / "model.safetensors").write_text(POINTER)
    checkpoints = ["--reward_checkpoint", f"pocket={folder}"]
    refused([*quick_args, *checkpoints], folder / "model.safetensors", "git lfs pull")
    (tmp_path / "ImageReward.pt").write_text(POINTER)
    words = ["--reward", "image_reward", "--reward_checkpoint", f"image_reward={tmp_path / 'ImageReward.pt'}"]
    refused([*quick_args, *words, "--heldout_reward", "clip"], "ImageReward.pt", "git lfs pull")
    (tmp_path / "ImageReward.pt").write_bytes(b"part of a file")
    refused([*quick_args, *words, "--heldout_reward", "clip"], "ImageReward.pt is damaged")
    (tmp_path / "own.py").write_text("import nothing_of_this_name\n")
    refused([*quick_args, "--reward", f"{tmp_path}/own.py:f"], "own.py cannot be imported")
    run([*quick_args, "--reward", "hpsv2.1", "--dry_run"])
    assert "reward `hpsv2.1`: xswu/HPSv2 could not be asked for HPS_v2.1_compressed.pt" in capsys.readouterr().out


def test_a_reward_that_the_hub_does_not_give(monkeypatch):
    def gone(url):
        raise RepositoryNotFoundError("404 Client Error", response=Mock(headers={}))

    monkeypatch.setattr(look, "get_hf_file_metadata", gone)
    with pytest.raises(Mistake, match="reward `clip` needs config.json from .* cannot be had"):
        look.look_at(RewardSpec("clip"))
    monkeypatch.setattr(look, "get_hf_file_metadata", lambda url: None)
    assert look.look_at(RewardSpec("clip")) is None


def test_a_damaged_small_decoder(quick_args, tmp_path):
    AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "taesd")
    (tmp_path / "taesd" / "diffusion_pytorch_model.safetensors").write_text(POINTER)
    refused([*quick_args, "--reward_decoder", tmp_path / "taesd"], "taesd", "git lfs pull")
