"""The commands of README.md: every one parses, and the files that it names are there."""

import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate_one_step
from diff_instruct.evaluation.candidates import Contender
from diff_instruct.models.sources import read_models
from diff_instruct.training.arguments import build_parser, parse_args


ROOT = Path(__file__).resolve().parents[1]


def commands(script="train_diff_instruct_pp.py"):
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "pocket/README.md"))
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    return [line.split(script, 1)[1] for line in blocks.splitlines() if script in line]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    build_parser().parse_args(shlex.split(command))


def test_there_are_commands():
    assert len(commands()) >= 3


@pytest.mark.parametrize("command", commands("evaluate_one_step.py"))
def test_evaluation_parses(command):
    args = evaluate_one_step.build_parser().parse_args(shlex.split(command))
    evaluate_one_step.check_args(args)
    assert all(Contender.parse(entry) for entry in args.models)


def test_the_evaluation_of_the_pocket_models_runs(tmp_path, monkeypatch):
    """The README's own command, with two prompts and two images."""
    (command,) = [c for c in commands("evaluate_one_step.py") if "pocket/" in c]
    monkeypatch.chdir(ROOT)
    short = f"{command} --num_prompts 2 --num_images 2 --output_dir {tmp_path}"
    evaluate_one_step.main(evaluate_one_step.build_parser().parse_args(shlex.split(short)))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["models"]) == ["reference", "generator"]
    assert result["models"]["reference"]["seconds_per_image"] > result["models"]["generator"]["seconds_per_image"]


def test_the_bare_command_uses_the_pocket_reference(tmp_path):
    args = parse_args(["--reward_scale", "10", "--cfg_scale", "4.5", "--output_dir", str(tmp_path)])
    assert (args.reward, args.heldout_reward) == (["pocket"], ["pocket_heldout"])
    assert args.num_eval_prompts * args.num_eval_images >= 256
    assert read_models(args).timestep == 400


def test_ones_own_prompts_replace_the_pocket_s(tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("fire\n")
    args = parse_args(["--train_prompts", str(prompts), "--output_dir", str(tmp_path)])
    assert args.train_prompts == str(prompts) and args.eval_prompts is None


def test_an_argument_given_wins_over_the_pocket_s_default(tmp_path):
    args = parse_args(["--learning_rate", "0.5", "--output_dir", str(tmp_path)])
    assert args.learning_rate == 0.5


def test_the_readme_s_prompt_file_needs_no_column():
    """The file that README.md makes is plain text, so none of its commands may name a column of it."""
    assert not any("my_prompts.txt" in c and "--caption_column" in c for c in commands())


def test_pocket_is_small_enough():
    files = [p for p in (ROOT / "pocket").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 40e6


def test_the_pipeline_imports_nothing_of_ours():
    source = (ROOT / "pipeline_one_step.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.M))
    assert imported == {"inspect", "json", "os", "shutil", "torch", "diffusers", "transformers"}
