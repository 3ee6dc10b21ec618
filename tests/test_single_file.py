"""A reference in one .safetensors file: the same networks as from its folder, or one line that says what to do."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from diff_instruct.export.layouts import clip_layout, open_clip_layout, unet_layout, vae_layout
from diff_instruct.mistake import Mistake
from diff_instruct.models.loading import load_reference
from diff_instruct.models.sources import models_of
from diff_instruct.training.arguments import parse_args
from tests.families import save
from tests.runs import load
from tests.test_apps import tiny_sdxl
from tests.tiny import tiny_sd


def write(stock, file):
    """The whole of an SD or SDXL pipeline in one file, by the names that other programs have."""
    state = unet_layout(stock.unet) | vae_layout(stock.vae)
    if isinstance(stock, StableDiffusionXLPipeline):
        state |= clip_layout(stock.text_encoder, "conditioner.embedders.0.transformer.")
        state |= open_clip_layout(stock.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        state |= clip_layout(stock.text_encoder, "cond_stage_model.transformer.")
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    return str(file)


@pytest.mark.parametrize("build, cls", [(tiny_sd, StableDiffusionPipeline), (tiny_sdxl, StableDiffusionXLPipeline)])
def test_a_whole_file_is_the_reference(tiny_args, tmp_path, build, cls):
    """A fine-tune of UNet, VAE and text encoder; what is not in it, tokenizers and configs, is the base's. Once."""
    base = build(tmp_path / "base")
    stock = cls.from_pretrained(base)
    for network in (stock.unet, stock.vae, stock.text_encoder):
        for p in network.parameters():
            p.data.mul_(1.1)
    file = write(stock, tmp_path / "fine_tune.safetensors")
    command = [*tiny_args, "--pretrained_model_name_or_path", file, "--single_file_config", base]
    command += ["--cache_dir", tmp_path / "cache"]
    args, models, read, pipe = load(command)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(read, name).state_dict(), getattr(stock, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(torch.equal(v, stock.unet.state_dict()[k]) for k, v in pipe.unet.state_dict().items())
    (folder,) = (f for f in (tmp_path / "cache" / "converted_single_files").iterdir() if f.is_dir())
    made = folder.stat().st_mtime_ns
    assert models_of(args).reference.path == str(folder) and folder.stat().st_mtime_ns == made


def test_a_network_alone_takes_the_rest_from_the_config(tiny_args, tmp_path):
    """FLUX, SD3, Z-Image and their kin are published so."""
    base = save("StableDiffusion3Pipeline", tmp_path / "base")
    command = [*tiny_args, "--pretrained_model_name_or_path", base]
    _, _, stock, _ = load(command)
    state = {k: (1.1 * v).contiguous() for k, v in stock.transformer.state_dict().items()}
    save_file(state, tmp_path / "network.safetensors")
    command = [*tiny_args, "--pretrained_model_name_or_path", tmp_path / "network.safetensors"]
    command += ["--single_file_config", base, "--cache_dir", tmp_path / "cache"]
    _, models, read, _ = load(command)
    for key, value in read.transformer.state_dict().items():
        assert torch.equal(value, state[key])
    for key, value in load_reference(models, torch.float32).text_encoder_3.state_dict().items():
        assert torch.equal(value, stock.text_encoder_3.state_dict()[key])


def test_dry_run_converts_nothing(tiny_args, tmp_path):
    base = tiny_sd(tmp_path / "base")
    file = write(StableDiffusionPipeline.from_pretrained(base), tmp_path / "a.safetensors")
    command = [*tiny_args, "--pretrained_model_name_or_path", file, "--single_file_config", base, "--dry_run"]
    assert models_of(parse_args([*command, "--cache_dir", str(tmp_path / "cache")])).reference.path == base
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_one_line(tiny_args, tmp_path):
    base = tiny_sd(tmp_path / "base")
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    save_file({"surprise": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    save_file({"a.scale_weight": torch.ones(())}, tmp_path / "fp8.safetensors")
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    cases = {
        "nowhere.safetensors": "there is no file",
        "lora.safetensors": "holds LoRA weights: give their base there",
        "fp8.safetensors": "is rounded .a.scale_weight is a scale.: give the file in bfloat16",
        "half.safetensors": "is not read by diffusers as a StableDiffusionPipeline",
        "old.ckpt": "only .safetensors are read",
        "other.safetensors": "is not read by diffusers as a StableDiffusionPipeline",
    }
    for name, message in cases.items():
        command = [*tiny_args, "--pretrained_model_name_or_path", str(tmp_path / name)]
        command += ["--single_file_config", base, "--cache_dir", str(tmp_path / "cache")]
        with pytest.raises(Mistake, match=message) as error:
            models_of(parse_args(command))
        assert "\n" not in str(error.value)
    command[-1] = write(StableDiffusionPipeline.from_pretrained(base), tmp_path / "whole.safetensors")
    command[command.index(str(tmp_path / "other.safetensors"))] = command[-1]
    with pytest.raises(Mistake, match="cannot be converted to diffusers' layout in .*name another --cache_dir"):
        models_of(parse_args(command))  # a file in the place of the folder
    with pytest.raises(Mistake, match="is for a reference in one file"):
        models_of(parse_args([*tiny_args, "--single_file_config", base]))
