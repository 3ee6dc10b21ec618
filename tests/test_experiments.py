"""The tables of `experiments/`, and that every run they ask for is one that the script accepts."""

import importlib.util
import json
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import arithmetic, full_size, predicted_peaks, step_cost
from diff_instruct.objectives import KAPPA
from diff_instruct.training.arguments import parse_args
from pocket import build
from pocket.world import caption
from tests.runs import history


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import black_box  # noqa: E402
import divergence_norms  # noqa: E402
import five_methods  # noqa: E402
import five_settings  # noqa: E402
import guided_estimates  # noqa: E402
import mixture  # noqa: E402
import mode_seeking  # noqa: E402
import one_change  # noqa: E402
import pocket_runs as runs  # noqa: E402
import pocket_tables as tables  # noqa: E402
import rivals  # noqa: E402
import start_from_pairs  # noqa: E402
import timesteps  # noqa: E402
from looks import looks  # noqa: E402
from pocket_judge import Judge  # noqa: E402


AT_625 = timesteps.settings_of(625, Namespace(work_dir="runs"))
EXPERIMENTS = [five_settings.SETTINGS, five_methods.SETTINGS, *one_change.QUESTIONS.values(), AT_625]
EXPERIMENTS.append(start_from_pairs.FIRST | start_from_pairs.variants("runs/pairs"))


WITHOUT_RIVALS = {k: v.partition(" --rival")[0] for k, v in black_box.SETTINGS.items() if "smoothing" not in k}
EXPERIMENTS.append(WITHOUT_RIVALS)


def test_settings_are_arguments_and_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for settings in EXPERIMENTS:
        parsed = [
            vars(parse_args([*runs.COMMON.split(), *arguments.split(), "--output_dir", str(tmp_path)]))
            for arguments in settings.values()
        ]
        assert all(parsed.count(p) == 1 for p in parsed)
    folders = Namespace(work_dir=tmp_path, max_train_steps=50)
    every = {arguments for settings in EXPERIMENTS for arguments in settings.values()}
    assert len({runs.folder_of(arguments, folders, 0) for arguments in every}) == len(every)


def test_generators_of_other_timesteps_are_distilled_and_that_of_pairs_is_not(monkeypatch):
    monkeypatch.chdir(ROOT)
    distilled, committed = (
        parse_args([*command.split(), "--output_dir", "runs"])
        for command in (f"{timesteps.PRETRAIN} --timestep 400", build.GENERATOR_COMMAND)
    )
    assert (distilled.pair_steps, distilled.pretrain_steps, distilled.timestep) == (0, 200, [400])
    assert committed.pair_steps > 0 and committed.pretrain_steps == 0
    assert distilled.max_train_steps == committed.max_train_steps == 0
    index = json.loads((ROOT / "pocket" / "generator" / "model_index.json").read_text())
    assert committed.timestep == [index["timestep"]]


def test_the_first_command_is_among_its_variants(monkeypatch):
    """With other seeds and validations only: its figures are those of the README."""
    monkeypatch.chdir(ROOT)
    (arguments,) = start_from_pairs.FIRST.values()
    readme = ["--reward_scale", "10", "--cfg_scale", "4.5", "--output_dir", "runs"]
    bare, ours = vars(parse_args(readme)), vars(parse_args([*readme, *arguments.split()]))
    assert ours == bare and start_from_pairs.STEPS == bare["max_train_steps"]


def test_norms_of_each_divergence_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(divergence_norms, "BATCH", 2)
    monkeypatch.setattr(divergence_norms, "WARM_UP", 1)
    monkeypatch.setattr(divergence_norms, "TIMESTEPS", (200, 900))
    divergence_norms.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(float(cell) > 0 for row in rows[2:] for cell in row.split("|")[2:4])


def test_guidance_asks_for_more_contrast_where_noise_is_strong(monkeypatch):
    monkeypatch.setattr(guided_estimates, "FRACTIONS", (0.2, 0.8))
    judge = Judge()
    judge.prompts = judge.prompts[:2]
    with torch.no_grad():
        spread = {key: x0.std() for key, x0 in guided_estimates.guided_estimates(judge).items()}
    assert spread[0.8, 4.5] > 1.5 * spread[0.8, 1.0] and spread[0.2, 4.5] < 1.5 * spread[0.2, 1.0]


@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_rivals_find_the_slope_of_numbers(monkeypatch, rival):
    """Of r = the mean of one channel, after a few batches: the gradient has that direction, and the size of κ."""
    monkeypatch.setattr(rivals.Smoothing, "draws", 100)
    torch.manual_seed(0)
    term = rivals.RIVALS[rival](lambda pixels, prompts: pixels[:, 0].mean(dim=(1, 2)), lambda x0: x0)
    for _ in range(4):
        x0 = torch.randn(32, 4, 8, 8) + torch.randn(32, 4, 1, 1)
        batch = Namespace(prompts=["c"] * 32, c={"encoder_hidden_states": torch.ones(32, 2, 3)})
        gradient = term.gradient(Namespace(x0=x0.requires_grad_(), batch=batch, figures={}))["reward"]
    assert gradient.flatten(1).norm(dim=1).mean() == pytest.approx(KAPPA, rel=1e-4)
    means = gradient.mean(dim=(0, 2, 3))
    assert means[0] < 0 and means[0].abs() > 3 * means[1:].abs().max()


@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_a_run_with_a_rival(quick_args, tmp_path, rival):
    """The training script's own loop, with the rival in the reward's place beside all of its other terms."""
    options = "--reward none --reward_scale 0 --heldout_reward pocket pocket_heldout --max_train_steps 1".split()
    rivals.main(parse_args([*map(str, quick_args), *options]), rival)
    (row,) = [row for row in history(tmp_path / "out") if "norm_reward" in row]
    assert row["norm_reward"] == pytest.approx(KAPPA, rel=1e-3)


def test_looks_counts_background_and_colour(monkeypatch):
    """A plain red square on white: right, half right, of no colour said, no sentence."""
    pixels = torch.ones(4, 3, 48, 48)
    pixels[:, 1:, 16:32, 16:32] = 0
    said = [caption("fish", "red", "white"), caption("fish", "blue", "white"), caption("fish", None, "white"), "what"]
    assert looks(pixels, said) == [1, 0.5, 1, 0]


def test_one_run_serves_all_who_ask_for_it():
    q = one_change.QUESTIONS
    assert q["suspects"]["at the lower half"] == five_methods.SETTINGS["DI++"] == q["weighting"]["`x0`"]
    assert five_settings.SETTINGS["(1, 0)"] == five_methods.SETTINGS["DI"]


@pytest.mark.parametrize("title, divergence", mode_seeking.DIVERGENCES.items())
def test_mode_seeking_s_generator_moves_towards_the_reference(monkeypatch, title, divergence):
    """It starts with a spread of 0.3; the reference has 1.01 along the line through its modes, 0.25 across."""
    monkeypatch.setattr(mode_seeking, "STEPS", 150)
    mean, covariance = mode_seeking.train(divergence, (0.02, 0.98))
    along, across = covariance.diagonal().sqrt().tolist()
    assert 0.6 < along < 1.3 and 0.15 < across < 0.4 and -0.5 < mean[0] < 0.1


@pytest.mark.parametrize("run", [mixture.RUNS[1], mixture.RUNS[2]])
def test_the_mixture_s_networks_learn(run):
    """Algorithm 1 on it, with a score distance and with a diffused reward: samples come nearer to the modes."""
    options = Namespace(
        seed=0, seeds=2, batch_size=64, width=32, learning_rate=3e-3, ta_learning_rate=6e-3, steps=60, ta_steps=2,
        weighting="eps", diffused_reward_steps=2,
    )  # fmt: skip
    _, divergence, alpha_rew, *how = run
    distances = []
    for options.steps in (1, 60):
        samples = mixture.train(options, divergence, alpha_rew, *how)
        distances.append(torch.cdist(samples, mixture.MEANS).amin(dim=2).mean().item())
    assert samples.shape == (2, 4000, 2) and distances[1] < 0.8 * distances[0], distances


def test_finished_runs_are_counted_up_to_the_first_gap(tmp_path):
    args = Namespace(work_dir=tmp_path, max_train_steps=50)
    for seed in (0, 1, 3):
        folder = runs.folder_of("--cfg_scale 1", args, seed)
        folder.mkdir(parents=True)
        (folder / "training_summary.json").write_text("{}")
    assert [f.name for f in runs.finished("--cfg_scale 1", args)] == ["cfg_scale-1-0", "cfg_scale-1-1"]


def test_differences_are_of_the_seeds_that_both_have():
    """Another seed shifts all by 10: differences between two that were trained leave it out, others keep it."""
    values = torch.arange(5.0)

    def scores(*shifts):
        return {key: torch.stack([values + s for s in shifts])[..., None] for key in tables.METRICS}

    found = {"before": scores(0), "a": scores(1, 11), "b": scores(3)}
    rows = tables.paired(found, [("b", "a"), ("a", "before")], {"a": "", "b": ""}).splitlines()[2:]
    assert rows[0].startswith("| b − a | +2.000 [+2.000, +2.000] |")
    assert rows[1].startswith("| a − before | +6.000 [+6.000, +6.000] |")
    assert tables.gains(found, ["a"]).splitlines()[2].startswith("| a | 2 | +6.000 [+6.000, +6.000] |")
    assert "| a | 2 | 3.000 to 13.000 |" in tables.spreads(found)


def test_a_run_that_fails_ends_the_experiment(tmp_path, monkeypatch):
    """Its core is free again, no more are begun, and the message says where to look."""
    begun = []

    class Process:
        pid = 0

        def __init__(self, command, **_):
            begun.append(command)

    def wait4(*_):
        time.sleep(0.2)
        return 0, 1 << 8, None

    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs.os, "wait4", wait4)
    monkeypatch.setattr(runs.os, "sched_setaffinity", lambda *_: None, raising=False)
    args = Namespace(work_dir=tmp_path, max_train_steps=1, seeds=9, at_once=1)
    with pytest.raises(RuntimeError, match=r"see .*cfg_scale-1-0/log.txt"):
        runs.train({"one": "--cfg_scale 1"}, args)
    assert len(begun) < 9


def rows_of(page):
    """The figures of every table row: its cells but the first."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    rows = {tuple(cell.strip() for cell in line.split("|")[2:]) for line in lines}
    return {row for row in rows if any(letter.isdigit() for cell in row for letter in cell)}


@pytest.mark.parametrize("folder", ["experiments", "benchmarks", "pocket"])
def test_every_script_starts_after_the_readme_s_install(monkeypatch, folder):
    """With requirements.txt alone: what only the tests or a GPU have use for is not imported at the top."""
    for name in ("resvg_py", "hypothesis", "sentencepiece", "torchao", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    for file in sorted((ROOT / folder).glob("*.py")):
        own = importlib.util.spec_from_file_location(f"started_{file.stem}", file)
        own.loader.exec_module(importlib.util.module_from_spec(own))


def test_full_size_starts_its_measurement(monkeypatch, tiny_model, capsys):
    """On a tiny model, all but the run itself: the second process is given arguments that the script accepts."""
    monkeypatch.setattr(full_size, "build", lambda source, folder, *_: shutil.copytree(tiny_model, folder))
    monkeypatch.setattr(full_size, "measure", lambda args: (Namespace(peaks={"start": 2**30}, seconds={}), [1.0]))

    def second_process(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        full_size.main()
        return Namespace(returncode=0)

    monkeypatch.setattr(full_size.subprocess, "run", second_process)
    monkeypatch.setattr(sys, "argv", ["full_size.py", "sd15", "--reward", "pocket"])
    with pytest.raises(SystemExit) as ended:
        full_size.main()
    assert ended.value.code == 0
    assert "peak, start: 1.00 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, words, message",
    [
        (arithmetic, "stable-diffusion-v1-5 --max_train_steps x", "--max_train_steps must be a whole number"),
        (predicted_peaks, "stable-diffusion-v1-5 --into {}", "--into {} cannot be written"),
        (predicted_peaks, "stable-diffusion-v1-5 --into {}/rows", "--into {}/rows: line 2 is no row of this script"),
        (full_size, "sd15 --lora_rank x", "--lora_rank must be a whole number"),
        (step_cost, "sd15 --lora_rank x", "--lora_rank must be a whole number"),
    ],
)
def test_benchmarks_tell_a_mistake_in_one_line(tmp_path, monkeypatch, script, words, message):
    """Before anything is predicted or built."""
    (tmp_path / "rows").write_text('{"model": "x", "base": "none", "with": []}\n{"model": ')
    monkeypatch.setattr(full_size, "build", None)
    monkeypatch.setattr(step_cost, "build", None)
    monkeypatch.setattr(predicted_peaks, "predicted", None)
    monkeypatch.setattr(sys, "argv", ["script.py", *words.format(tmp_path).split()])
    with pytest.raises(SystemExit) as ended:
        benchmarks.run(script.main)
    assert ended.value.code.startswith("error: " + message.format(tmp_path))


def test_hours_of_two_stages_whatever_the_reward(monkeypatch, capsys):
    """Pretraining has no reward, and its own guidance, also where the reward's scale is measured."""
    seen = []
    monkeypatch.setattr(arithmetic, "operations", lambda args: seen.append(args) or 0.05)
    words = "PixArt-XL-2-512x512 --pretrain_steps 10 --max_train_steps 10 --reward_ratio 2 --cfg_scale 4"
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", *words.split()])
    arithmetic.main()
    first, second = seen
    assert (first.reward, first.reward_ratio, first.cfg_scale) == (["none"], None, first.pretrain_cfg_scale)
    assert (second.reward, second.reward_ratio, second.cfg_scale) == (["image_reward"], 2, 4)
    assert "together 1.6e-05 EFLOP" in capsys.readouterr().out  # 20 steps of 16 images


def test_tables_of_the_page_are_what_the_scripts_wrote():
    """The first command's is in the README, too."""
    written = set().union(*map(rows_of, (*ROOT.glob("experiments/*.md"), ROOT / "README.md")))
    quoted = rows_of(ROOT / "docs" / "experiments.md")
    assert quoted and not quoted - written
