"""What is said before weights load: mistakes in one line, and the memory that each actor needs."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diff_instruct.export.apps import noise_levels, where_it_runs
from diff_instruct.mistake import Mistake
from diff_instruct.models import sources
from diff_instruct.models.lora import add_lora, reach, trained_parameters
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import plan, table
from diff_instruct.training import set_up
from diff_instruct.training.arguments import parse_args
from tests.runs import load
from tests.tiny import tiny_sd
from train_diff_instruct_pp import main


ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ROOT / "benchmarks" / "architectures"


def broken(folder, change):
    """A copy of a pipeline's folder with something wrong in it."""
    target = folder.parent / "broken"
    shutil.copytree(folder, target)
    change(target)
    return str(target)


def edit(file, **values):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (
            edit("model_index.json", _class_name="WanPipeline"),
            "is a WanPipeline, which is not one of the",
        ),
        (lambda f: shutil.rmtree(f / "vae"), "has no vae: expected vae/config.json"),
        (lambda f: shutil.rmtree(f / "unet"), "has no unet: expected unet/config.json"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "has no text_encoder: expected"),
        (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler: expected"),
        (edit("model_index.json", unet=[None, None]), "has no unet: its model_index.json must name one"),
        (
            edit("scheduler/scheduler_config.json", prediction_type="flow_prediction"),
            "type flow_prediction",
        ),
    ],
)
def test_incomplete_references(tiny_args, tmp_path, change, message):
    tiny_sd(tmp_path / "model")
    path = broken(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as error:
        main(parse_args([*tiny_args, "--pretrained_model_name_or_path", path]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prediction_type, last", [("epsilon", 998), ("v_prediction", 999)])
def test_pure_noise_holds_nothing_for_the_prediction_of_noise(tiny_args, tmp_path, prediction_type, last):
    """A schedule of zero terminal SNR: t* = 999 is for v-prediction alone, π(t) ends before it."""
    tiny_sd(tmp_path / "model")
    edit("scheduler/scheduler_config.json", prediction_type=prediction_type, rescale_betas_zero_snr=True)(
        tmp_path / "model"
    )
    command = [*tiny_args, "--pretrained_model_name_or_path", str(tmp_path / "model"), "--timestep", "999"]
    if last == 998:
        with pytest.raises(Mistake, match=r"--timestep 999 is outside the schedule of .*: t\* must be in 0\.\.998"):
            models_of(parse_args(command))
        return
    *_, pipe = load(command)
    assert pipe.schedule.last == last and pipe.schedule.alphas[999] == 0
    assert pipe.schedule.timesteps(torch.tensor([0.0, 1 - 1e-7]), 0.0, 1.0).tolist() == [0, 998]
    assert noise_levels(pipe).sigmas == (math.inf, 0.0)
    assert "Elsewhere: other programs take" in where_it_runs(pipe, "apples_1step", "fire")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--timestep", "1000"], r"--timestep 1000 is outside the schedule of .*: t\* must be in 0\.\.999"),
        (["--timestep", "-1"], "--timestep must be a whole number of at least 0"),
        (["--resolution", "17"], "--resolution 17 cannot be made by .*: it must be a multiple of 2"),
        (["--resolution", "0"], "--resolution must be pixels, as in 1024"),
        (["--enable_xformers_memory_efficient_attention"], "xformers"),
        (["--use_8bit_adam"], "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes"),
        (["--pretrained_generator_name_or_path", "/nowhere/unet.safetensors"], "there is no file /nowhere/unet"),
        (["--pretrained_generator_name_or_path", "{}"], "is neither a pipeline"),
        (["--pretrained_generator_name_or_path", "{}/other.safetensors", "--timestep", "9"],
         r"does not fit the reference's unet: 2 of \d+ weights .* such as conv_in.weight, surprise"),
        (["--pretrained_generator_name_or_path", "{}/vae"], "is a AutoencoderKL, but the reference a UNet2DCondition"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line(tiny_args, tmp_path, monkeypatch, options, message):
    import diff_instruct.training.environment as optimization

    monkeypatch.setattr(optimization, "is_bitsandbytes_available", lambda: False)  # on this machine it may be there
    folder = tiny_sd(tmp_path / "model")
    args = parse_args([*tiny_args, "--pretrained_model_name_or_path", folder])
    state = {k: torch.zeros(v.shape) for k, v in models_of(args).networks["unet"].state_dict().items()}
    state["conv_in.weight"], state["surprise"] = torch.zeros(1), torch.zeros(1)
    (tmp_path / "start").mkdir()
    save_file(state, tmp_path / "start" / "other.safetensors")
    shutil.copytree(f"{folder}/vae", tmp_path / "start" / "vae")
    options = [o.format(tmp_path / "start") for o in options]
    with pytest.raises(ValueError, match=message) as error:
        main(parse_args([*tiny_args, "--pretrained_model_name_or_path", folder, *options]))
    assert "\n" not in str(error.value)


def test_xformers_is_for_unets(tiny_args):
    with pytest.raises(ValueError, match="is for UNets, but .* is a PixArtAlphaPipeline"):
        main(parse_args([*tiny_args, "--enable_xformers_memory_efficient_attention"]))


def planned(model, *options):
    args = parse_args(["--pretrained_model_name_or_path", str(ARCHITECTURES / model), "--train_prompts", __file__,
                       "--reward", "pocket", "--output_dir", "not-made", *options])  # fmt: skip
    models = models_of(args)
    return models, plan(args, models, "bf16")


@pytest.mark.parametrize(
    "model, parameters, full, ta_lora",
    [("PixArt-XL-2-512x512", 0.611, 23, 13), ("stable-diffusion-v1-5", 0.860, 33, 19),
     ("stable-diffusion-xl-base-1.0", 2.567, 98, 57)],
)  # fmt: skip
def test_plan_of_the_papers_models(model, parameters, full, ta_lora):
    """Parameters in billions as published; GB of generator, TA and reference, as reckoned in the papers' settings."""
    models, rows = planned(model)
    assert sum(p.numel() for p in models.networks[models.denoiser].parameters()) / 1e9 == pytest.approx(
        parameters, abs=6e-4
    )
    actors = ("generator", "teaching assistant", "reference")
    assert sum(sum(rows[a].values()) for a in actors) / 1e9 == pytest.approx(full, abs=0.6)
    rows = planned(model, "--ta_lora_rank", "4")[1]
    assert sum(sum(rows[a].values()) for a in actors) / 1e9 == pytest.approx(ta_lora, abs=0.6)


def test_plan_is_what_a_run_holds(tiny_args):
    """Counted on the tiny model: trained parameters of LoRA, and all weights."""
    args = parse_args([*tiny_args, "--lora_rank", "2", "--ta_lora_rank", "3", "--no-use_ema", "--use_8bit_adam"])
    models = models_of(args)
    rows = plan(args, models, "no")
    network = type(models.networks["transformer"]).from_config(models.networks["transformer"].config)
    n, k = (
        sum(p.numel() for p in network.parameters()),
        sum(
            p.numel()
            for p in trained_parameters(add_lora(network, "a", 2, 2, models.family.lora_targets), "a").values()
        ),
    )
    assert rows["generator"] == {"weights": 4 * k, "gradients": 4 * k, "optimizer": 2 * k, "ema": 0}
    assert rows["reference"]["weights"] == 4 * n and rows["teaching assistant"]["weights"] == 4 * k // 2 * 3
    assert table(rows).splitlines()[-2].startswith("sum")


def test_dry_run_stops_before_weights(tiny_args, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(set_up, "load_actors")
    main(parse_args([*tiny_args, "--dry_run"]))
    out = capsys.readouterr().out
    assert "teaching assistant" in out and "gradients" in out
    assert not list(tmp_path.glob("out/*.json"))


KNOWN = {}


@pytest.fixture
def read_once(monkeypatch):
    """Networks on the meta device are made once for all commands of an architecture: none of them changes them."""
    read = sources.read_networks

    def known(source, family, index, vae=None):
        if vae is not None:
            return read(source, family, index, vae)
        return KNOWN.setdefault(source.path, KNOWN.get(source.path) or read(source, family, index))

    monkeypatch.setattr(sources, "read_networks", known)


def recipes():
    pages = ("recipes/README.md", "docs/your-card.md")
    text = "\n".join((ROOT / page).read_text() for page in pages).replace("\\\n", " ")
    return re.findall(r"^accelerate launch .*$", text, flags=re.M)


@pytest.mark.parametrize("command", recipes())
def test_recipes(command, monkeypatch, tmp_path, read_once):
    """Every command parses, names an accelerate config that exists, and fits the published architecture. It is planned
    on it, but for those that are dry runs, which are of the recipes' models."""
    words = shlex.split(command)
    script = words.index("train_diff_instruct_pp.py")
    config = words[words.index("--config_file") + 1]
    assert (ROOT / config).is_file() and script == words.index(config) + 1
    monkeypatch.chdir(tmp_path)
    args = parse_args(words[script + 1 :])
    several = args.timestep if args.timestep and len(args.timestep) > 1 else None
    hub_id = args.pretrained_model_name_or_path
    args.pretrained_model_name_or_path = str(ARCHITECTURES / hub_id.split("/")[1])
    args.pretrained_generator_name_or_path = args.pretrained_generator_lora = None
    models = models_of(args)
    assert args.dry_run or sum(plan(args, models, "bf16")["generator"].values()) > 2e8
    before_flow = {"PixArtAlphaPipeline": 400, "StableDiffusionPipeline": 625, "StableDiffusionXLPipeline": 399}
    assert models.timestep == (several or before_flow.get(models.family.name, 1000))


def test_layers_that_get_adapters(tiny_args, tiny_model):
    """The family's by default; ends of names; one pattern; a word that names no layer is said."""
    command = [*tiny_args, "--lora_rank", "2", "--lora_target_modules"]

    def adapted(*words):
        *_, pipe = load([*(command if words else command[:-1]), *words])
        return {k.split(".lora_A")[0] for k in trained_parameters(pipe.denoiser, "generator") if ".lora_A" in k}

    assert len(adapted()) == 10 and adapted("to_q", "ff.net.2") < adapted()
    assert adapted(r"transformer_blocks\.\d+\.attn1\.to_[qk]") == {
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.to_k",
    }
    for words, message in (
        (["to_q", "nothing"], "nothing is the name of no layer"),
        (["(to"], "no regular expression"),
        ([r".*attn1.*"], r"\.\*attn1\.\* also names transformer_blocks.0.attn1, a Attention, which gets no adapters"),
        (["to_q", "0"], "0 also names transformer_blocks.0, a BasicTransformerBlock"),
    ):
        with pytest.raises(Mistake, match=message):
            models_of(parse_args([*command, *words]))
    network = models_of(parse_args(tiny_args)).networks["transformer"]
    layers, share = reach(network, ("to_q",))
    assert layers == 2 and share == pytest.approx(2 * 17 * 16 / sum(p.numel() for p in network.parameters()))


def test_there_are_recipes_for_all_families():
    assert len(recipes()) >= 5


def test_a_latent_consistency_model_is_no_reference(tiny_args, tmp_path):
    """Its guidance is an input that nothing here would give: refused, not run without."""
    tiny_sd(tmp_path / "lcm")
    edit("unet/config.json", time_cond_proj_dim=16)(tmp_path / "lcm")
    with pytest.raises(Mistake, match="is a latent consistency model"):
        main(parse_args([*tiny_args, "--pretrained_model_name_or_path", str(tmp_path / "lcm"), "--dry_run"]))
