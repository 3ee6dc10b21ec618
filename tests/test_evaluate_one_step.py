"""The evaluation script on tiny models: what it writes, that its figures are right, that it goes on when stopped."""

import gc
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, PixArtAlphaPipeline, StableDiffusionXLPipeline
from PIL import Image

import evaluate_one_step as script
from diff_instruct.evaluation.candidates import Contender
from diff_instruct.evaluation.judge import evaluate
from diff_instruct.evaluation.noise import fixed_noise, noise_and_generators
from diff_instruct.evaluation.pictures import draw_reference
from diff_instruct.evaluation.statistics import mean_with_interval
from diff_instruct.evaluation.store import Batches, fingerprint, remember
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import ModelSource
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.sources import read_models
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.rewards.loading import load_scorers
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.specs import read_scorers
from pipeline_one_step import OneStepPipeline
from tests import processes
from tests.tiny import PROMPTS, tiny_checkpoints, tiny_sdxl


@pytest.fixture(scope="module")
def export(tiny_model, tmp_path_factory):
    """Folder of an exported OneStepPipeline whose network is not quite the reference's."""
    stock = PixArtAlphaPipeline.from_pretrained(tiny_model)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in stock.transformer.parameters():
            p += 0.02 * torch.randn(p.shape, generator=rng)
    scheduler = DDPMScheduler.from_config(stock.scheduler.config, clip_sample=False, variance_type="fixed_small")
    parts = {**dict.fromkeys(OneStepPipeline._optional_components), **stock.components, "scheduler": scheduler}
    folder = tmp_path_factory.mktemp("exported") / "export"
    OneStepPipeline(**parts, family="PixArtAlphaPipeline", timestep=400).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path, tiny_model, tiny_pocket, export):
    """Arguments that compare an export with the reference; more can be appended."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return [
        "--models", f"mine={export}", f"reference={tiny_model},steps=3,guidance=2",
        "--prompts", tmp_path / "prompts.txt", "--rewards", "pocket_heldout", "pocket",
        "--reward_checkpoint", *tiny_checkpoints(tiny_pocket),
        "--num_images", 2, "--batch_size", 4, "--grid_prompts", 3, "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def run(arguments, folder=None):
    arguments = [*arguments, "--output_dir", folder] if folder else arguments
    args = script.build_parser().parse_args([str(a) for a in arguments])
    script.main(args)
    return json.loads((Path(args.output_dir) / "evaluation.json").read_text())


def timeless(result):
    """Without what depends on the clock, on memory and on where it was written."""
    models = {
        name: {k: v for k, v in m.items() if k[:4] not in ("seco", "peak")} for name, m in result["models"].items()
    }
    return {**result, "models": models, "arguments": None}


def test_a_run_writes_all_that_it_promises(options, tmp_path, capsys):
    result = run([*options, "--save_images"])
    out = tmp_path / "out"
    assert list(result["models"]) == ["mine", "reference"] and result["prompts"]["number"] == len(PROMPTS)
    for model in result["models"].values():
        assert list(model["figures"]) == ["pocket_heldout", "pocket", "diversity"]
        for entry in model["figures"].values():
            low, high = entry["ci95"]
            assert low <= entry["mean"] <= high and low < high
        assert model["seconds_per_image"] > 0 and model["peak_memory_gib"] > 0.1
    assert result["comparison"]["baseline"] == "mine" and list(result["comparison"]["models"]) == ["reference"]
    assert result["versions"]["torch"] == version("torch")
    assert result["diversity_by"] == "pocket_heldout"
    assert result["prompts"]["sha256"] == sha256sum(tmp_path / "prompts.txt")
    for name in ("mine", "reference"):
        assert len(list((out / "images" / name).glob("*.png"))) == 2 * len(PROMPTS)
    with Image.open(out / "evaluation.png") as sheet:
        assert sheet.width > 2 * 150 and sheet.height > 3 * 150  # two models, three prompts
    text = (out / "evaluation.md").read_text()
    mean = result["models"]["reference"]["figures"]["pocket"]["mean"]
    assert f"{mean:.3f} [" in text and "win rate" in text and text in capsys.readouterr().out


def sha256sum(file):
    return subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]


def test_figures_are_those_of_the_training_script_s_evaluation(options, export, tiny_pocket):
    result = run(options)["models"]["mine"]["figures"]
    pipe = OneStepPipeline(
        **{**dict.fromkeys(OneStepPipeline._optional_components), **loaded(export).components},
        family="PixArtAlphaPipeline",
        timestep=400,
    )
    scorers = load_scorers(read_scorers(["pocket", "pocket_heldout"], tiny_checkpoints(tiny_pocket)), "cpu")
    mix = Mix({"pocket": scorers.pop("pocket")}, {"pocket": 1.0})
    encode = Conditioning(pipe.encode_prompt, "cpu")
    scores = evaluate(
        Accelerator(), Denoiser(pipe, pipe.denoiser), encode, PROMPTS, 2, [pipe.latent_shape()], mix, scorers, 1
    )
    for ours, theirs in (("pocket", "reward"), ("pocket_heldout", "heldout"), ("diversity", "diversity")):
        mean, interval = mean_with_interval(scores[theirs])
        assert result[ours]["mean"] == pytest.approx(mean, abs=1e-4)
        assert result[ours]["ci95"] == pytest.approx(interval, abs=1e-4)


def loaded(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def test_the_reference_starts_from_the_same_noise_as_the_generators(options, tiny_model, tmp_path):
    """Its pictures are those that the training script draws from `fixed_noise`, the default seed's."""
    run([*options, "--save_images"])
    stock, models = PixArtAlphaPipeline.from_pretrained(tiny_model), read_models(ModelSource(tiny_model))
    stock_call, steps = stock.__call__, []

    def three_steps(self, *args, num_inference_steps, **kwargs):
        steps.append(num_inference_steps)
        return stock_call(*args, num_inference_steps=3, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixArtAlphaPipeline, "__call__", three_steps)
        for i, prompt in enumerate(PROMPTS):
            noise = fixed_noise((4, 8, 8), i, 2)
            expected = draw_reference(models, stock, [prompt] * 2, noise, (16, 16), 2.0)
            for k in range(2):
                with Image.open(tmp_path / "out" / "images" / "reference" / f"{i:05d}-{k}.png") as image:
                    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
                torch.testing.assert_close(pixels, expected[k], atol=1.01 / 255, rtol=0)
    assert len(steps) == 2 * len(PROMPTS)


def test_generators_go_on_after_the_noise():
    """What a sampler draws later must not be the noise again."""
    z, rngs = noise_and_generators((4, 2, 2), 3, 2)
    assert torch.equal(z, fixed_noise((4, 2, 2), 3, 2))
    assert not torch.equal(torch.randn(4, 2, 2, generator=rngs[0]), z[0])


def test_one_network_however_it_is_given(options, export, tiny_model, tmp_path):
    """An export; its network in the base pipeline; that network's file: no difference."""
    network = export / "transformer"
    file = network / "diffusion_pytorch_model.safetensors"
    names = [
        f"folder={network},base={tiny_model},timestep=400,noise=unit",
        f"file={file},base={tiny_model},timestep=400,noise=unit",
    ]
    names += [f"partial={export},base={tiny_model}", f"other={network},base={tiny_model},timestep=300,noise=unit"]
    comparison = run([*options, "--models", f"export={export}", *names])["comparison"]["models"]
    for name in ("folder", "file", "partial"):
        for entry in comparison[name].values():
            assert entry["difference"]["ci95"] == pytest.approx([0, 0], abs=1e-5)
    assert abs(comparison["other"]["pocket"]["difference"]["mean"]) > 1e-3


def test_a_whole_pipeline_that_is_a_one_step_model(options, tiny_model):
    """As the released SDXL checkpoints: a stock pipeline, whose own network runs once at t*."""
    result = run(
        [
            *options,
            "--models",
            f"own={tiny_model},timestep=400",
            f"put={tiny_model},base={tiny_model},timestep=400,noise=unit",
        ]
    )
    assert result["models"]["own"]["figures"] == result["models"]["put"]["figures"]


def test_released_checkpoints_of_sdxl(options, tmp_path):
    """As they lie on the Hub: a file of UNet weights (DMD2, DIDR), and a pipeline with an fp16 UNet (DI++, DI*)."""
    base, whole = tiny_sdxl(tmp_path / "base"), tiny_sdxl(tmp_path / "whole", seed=1)
    unet = StableDiffusionXLPipeline.from_pretrained(whole).unet
    torch.save(unet.state_dict(), tmp_path / "unet.bin")
    unet.to(torch.float16).save_pretrained(Path(whole) / "unet", variant="fp16")
    (Path(whole) / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    models = [
        f"dmd2={tmp_path / 'unet.bin'},base={base},timestep=399,noise=unit",
        f"dipp={whole},timestep=399,variant=fp16",
    ]
    models += [
        f"dipp-in-base={whole}/unet/diffusion_pytorch_model.fp16.safetensors,base={base},timestep=399,noise=unit"
    ]
    models += [f"sdxl={base},steps=2,guidance=5"]
    result = run([*options, "--models", *models, "--mixed_precision", "bf16", "--num_prompts", 3])
    others = result["comparison"]["models"]
    assert abs(others["dipp-in-base"]["pocket"]["difference"]["mean"]) < 0.05  # the file is rounded to fp16, then bf16
    assert abs(others["sdxl"]["pocket"]["difference"]["mean"]) > 0.05
    assert not result["comparison"]["other_noise"]
    assert {m["latent_shape"][0] for m in result["models"].values()} == {4}


def test_models_are_freed_one_after_the_other(options, export, tiny_model):
    """Without waiting for the garbage collector: two may not fit."""

    def alive():
        return [o for o in gc.get_objects() if type(o) in (OneStepPipeline, PixArtAlphaPipeline)]

    gc.collect()
    gc.disable()
    try:
        before = alive()
        run([*options, "--models", f"mine={export}", f"reference={tiny_model},steps=2,guidance=1"])
        run([*options, "--models", f"network={export},base={tiny_model}"])
        assert len(alive()) == len(before)
    finally:
        gc.enable()


def interrupted_after(number, judge):
    def stopping(*args):
        stopping.calls += 1
        if stopping.calls > number:
            raise KeyboardInterrupt
        return judge(*args)

    stopping.calls = 0
    return stopping


@pytest.mark.parametrize("number", [1, 5])
def test_a_killed_run_goes_on_with_the_same_figures(options, tmp_path, monkeypatch, number):
    """Killed within the first or the second model; a batch that was being written does not count."""
    whole = run(options, tmp_path / "whole")
    judge = script.judge
    monkeypatch.setattr(script, "judge", interrupted_after(number, judge))
    with pytest.raises(KeyboardInterrupt):
        run(options)
    (tmp_path / "out" / "scores" / "mine" / "00003.partial").write_text('{"scores": {"pock')
    monkeypatch.setattr(script, "judge", interrupted_after(8 - number, judge))  # 7 prompts, 2 a batch, 2 models
    assert timeless(run(options)) == timeless(whole)
    monkeypatch.setattr(script, "judge", None)
    assert timeless(run(options)) == timeless(whole)  # nothing is left to do: only the tables are made


def test_two_processes_give_the_figures_of_one(options, tmp_path):
    one = run(options, tmp_path / "one")
    log = tmp_path / "log"
    two = processes.Run([*options, "--output_dir", tmp_path / "two"], log, processes=2, script=processes.evaluate)
    assert two.wait() == [0, 0], log.read_text()[-3000:]
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    for name, model in one["models"].items():
        for key, entry in model["figures"].items():
            assert two["models"][name]["figures"][key]["mean"] == pytest.approx(entry["mean"], abs=1e-5)
            assert two["models"][name]["figures"][key]["ci95"] == pytest.approx(entry["ci95"], abs=1e-5)


@pytest.mark.parametrize(
    "change, name",
    [(["--seed", 7], "seed"), (["--num_prompts", 3], "prompts"), (["--rewards", "pocket"], "rewards, reward_files"),
     (["--batch_size", 8], "batch_size")],
)  # fmt: skip
def test_other_settings_in_the_same_folder_are_a_mistake(options, change, name):
    run(options)
    with pytest.raises(ValueError, match=rf"holds an evaluation with other settings \({name}\)"):
        run([*options, *change])


def test_a_model_that_was_trained_again_is_noticed_and_a_new_one_may_join(tmp_path):
    file = tmp_path / "unet" / "weights.bin"
    file.parent.mkdir()
    file.write_text("one")
    remember(tmp_path, {"seed": 0}, {"a": [{}, None]})  # nothing came of it, so the next start may differ
    remember(tmp_path, {"seed": 1}, {"a": [{"path": "x"}, fingerprint(tmp_path)]})
    Batches(tmp_path, "a", 1).write(0, {})
    remember(tmp_path, {"seed": 1}, {"b": [{}, fingerprint("user/model")]})
    remember(tmp_path, {"seed": 1}, {"a": [{"path": "x"}, fingerprint(tmp_path)]})  # what lies beside it is new
    file.write_text("three")
    with pytest.raises(ValueError, match="model a"):
        remember(tmp_path, {"seed": 1}, {"a": [{"path": "x"}, fingerprint(tmp_path)]})
    assert set(json.loads((tmp_path / "settings.json").read_text())["models"]) == {"a", "b"}


def test_a_file_is_there_with_all_of_its_text_or_not_at_all(tmp_path, monkeypatch):
    def killed(partial, file):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Batches(tmp_path, "a", 1).write(0, {"scores": {}})
    assert Batches(tmp_path, "a", 1).missing() == [0]


def test_categories_of_a_file(options, tmp_path):
    rows = [f"{p}\t{c}" for p, c in zip(PROMPTS, ["fruit", *["animal"] * 2, *["sky"] * 4])]
    (tmp_path / "rows.tsv").write_text("\n".join(["Prompt\tCategory", *rows]) + "\n")
    columns = ["--prompts", tmp_path / "rows.tsv", "--caption_column", "Prompt", "--category_column", "Category"]
    result = run([*options, *columns, "--mean_over", "categories"])
    assert result["prompts"]["categories"] == {"animal": 2, "fruit": 1, "sky": 4}
    figure = result["models"]["mine"]["figures"]["pocket"]
    parts = [entry["mean"] for entry in figure["by_category"].values()]
    assert figure["mean"] == pytest.approx(sum(parts) / 3)
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "mean over the categories" in text and "animal (2)" in text


def test_own_functions_and_one_image(options, tmp_path):
    (tmp_path / "mine.py").write_text("def red(pixels, prompts):\n    return pixels[:, 0].mean(dim=(1, 2))\n")
    reward = f"{tmp_path / 'mine.py'}:red"
    result = run([*options, "--rewards", reward, "--num_images", 1])
    assert list(result["models"]["mine"]["figures"]) == ["red"]  # no diversity of one image
    assert 0 < result["models"]["mine"]["figures"]["red"]["mean"] < 1
    assert run([*options, "--rewards", reward], tmp_path / "two")["diversity_by"] == "pixels"


def test_contenders():
    assert Contender.parse("a-1=x/y,steps=25,guidance=4.5") == Contender("a-1", "x/y", steps=25, guidance=4.5)
    assert Contender.parse("b=x/y/z.bin,base=p/q,timestep=399,noise=unit,variant=fp16") == Contender(
        "b", "x/y/z.bin", base="p/q", timestep=399, noise="unit", variant="fp16"
    )


def test_commas_in_a_path(tmp_path, monkeypatch):
    """A folder that a sweep named: with a backslash; without it the line says so."""
    assert Contender.parse(r"mine=lr=1e-5\,bs=4") == Contender("mine", "lr=1e-5,bs=4")
    named = Contender.parse(r"mine=a\,b/unet,base=c\,d\,e,timestep=399,noise=unit")
    assert named == Contender("mine", "a,b/unet", base="c,d,e", timestep=399, noise="unit")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-5,bs=4").mkdir()
    with pytest.raises(Mistake, match=r"unknown option `bs`; .*; a comma in a path is written \\,$"):
        Contender.parse("mine=lr=1e-5,bs=4")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--models", "mine"], "--models mine: write NAME=PATH"),
        (["--models", "a/b=x"], "a name has letters"),
        (["--models", "a=x,step=3"], "unknown option `step`"),
        (["--models", "a=x,steps=many,guidance=1"], "steps must be a number"),
        (["--models", "a=x,steps=25"], "steps and guidance belong together"),
        (["--models", "a=x,steps=25,guidance=1,timestep=3"], "goes without base, timestep and noise"),
        (["--models", "a=x,steps=1,guidance=1"], "steps must be at least 2"),
        (["--models", "a=x", "a=y"], "the name `a` is given twice"),
        (["--models", "a=/nowhere/at/all"], "from /nowhere/at/all: there is no such folder"),
        (["--models", "a=TINY"], "is a PixArtAlphaPipeline: say steps"),
        (["--models", "a=TINY/transformer"], "is a network only: say its pipeline"),
        (["--models", "a=TINY/transformer,steps=4,guidance=2"], "is no folder of a whole pipeline"),
        (["--models", "a=TINY/transformer,base=TINY"], "names no t"),
        (["--models", "a=EXPORT,timestep=400"], "knows its own t"),
        (
            ["--models", "a=EXPORT/transformer,base=EXPORT,timestep=400,noise=unit"],
            "is a OneStepPipeline, which is not one of the",
        ),
        (["--models", "a=EMPTY"], "has no model_index.json"),
        (["--baseline", "other"], "no model of this name; there are mine, reference"),
        (["--resolution", "18"], "must be a multiple of 4"),
        (["--rewards", "beauty"], "unknown reward `beauty`"),
        (["--rewards", "pocket", "pocket"], "`pocket` is given twice"),
        (["--reward_checkpoint", "pocket=/nowhere"], "no such file or folder"),
        (["--prompts", "/nowhere.txt"], "neither one of coco2017, parti, hpsv2, nor a file"),
        (["--prompts", "BLANK"], "has no prompts"),
        (["--prompts", "parti"], "cannot be downloaded"),
        (["--prompts", "coco2017"], "cannot be downloaded"),
        (["--dataset_name", "user/set"], "either --prompts or --dataset_name"),
        (["--mean_over", "categories"], "has none; name their column"),
        (["--category_column", "Category"], "has no column `Category`"),
        (["--batch_size", "1"], "at least --num_images"),
        (["--num_images", "0"], "--num_images must be a whole number of at least 1"),
        (["--output_dir", "/dev/null/out"], "--output_dir /dev/null/out cannot be made"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_loads(
    options, tiny_model, export, tmp_path, monkeypatch, change, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n   \n")
    monkeypatch.setattr(script, "load_scorers", None)
    places = {"TINY": tiny_model, "EXPORT": export, "EMPTY": tmp_path / "empty", "BLANK": tmp_path / "blank.txt"}
    for word, path in places.items():
        change = [part.replace(word, str(path)) for part in change]
    with pytest.raises(ValueError, match=message) as error:
        run([*options, *change])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_export_on_the_hub_is_run_only_if_it_is_trusted(options, monkeypatch):
    index = {"_class_name": ["pipeline_one_step", "OneStepPipeline"]}
    monkeypatch.setattr("diff_instruct.evaluation.candidates.read_index", lambda path, cache_dir: index)
    with pytest.raises(ValueError, match="add --trust_remote_code"):
        run([*options, "--models", "a=user/model"])
