"""README.md and the other pages: every command runs on a tiny model or says why not; links, paths and flags exist."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

import demo
import evaluate_one_step
import export_for_apps
import train_diff_instruct_pp
from diff_instruct.evaluation.candidates import Contender
from diff_instruct.models.sources import models_of
from diff_instruct.training.arguments import build_parser, parse_args
from tests.tiny import PROMPTS


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "recipes/README.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
OTHERS = ["pocket/README.md", "benchmarks/architectures/README.md"]  # their commands are parsed
PLANNED = ["recipes/README.md", "docs/your-card.md"]  # tests/test_configs.py plans each of their commands
TRAIN, EVALUATE = "train_diff_instruct_pp.py", "evaluate_one_step.py"
NOT_RUN = {  # how a command starts: why it is not run here
    "pip install": "the environment is there already",
    "python -m pytest": "these are the tests",
    "python examples/reward_server.py": "serves until it is stopped; tests/test_black_box.py tests it",
    "ruff": "a check of the style, not installed with the tests",
    "python tests/parity/": "needs a package index or the Hub; python -m pytest -m oracle runs it",
    "OMP_NUM_THREADS=1 python benchmarks/full_size.py": "builds and runs a full-size model",
    "OMP_NUM_THREADS=1 python benchmarks/reward_cost.py": "takes minutes and 8 GB",
    "OMP_NUM_THREADS=1 python benchmarks/role_switch.py": "builds the real number of layers: half a minute",
    "OMP_NUM_THREADS=1 python benchmarks/rounded_load.py": "writes gigabytes of random weights",
    "OMP_NUM_THREADS=1 python benchmarks/rounded_gradient.py": "runs a full-size model",
    "OMP_NUM_THREADS=1 python benchmarks/step_cost.py": "takes minutes",
    "python experiments/": "take minutes to hours; tests/test_experiments.py tests them",
    "python benchmarks/arithmetic.py": "plans a full-size model, a minute",
    "python benchmarks/predicted_peaks.py": "plans full-size models, a minute or more each",
    "accelerate launch train_diff_instruct_pp.py --dry_run --memory_gib": "a full-size model",
}


def blocks(page):
    """The fenced blocks of a page: pairs of language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.S | re.M)


def shell_commands(text):
    """The commands of a shell block, those that go over several lines as one, a here-document with its end."""
    found, lines = [], iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        here = re.search(r"<<'(\w+)'", line)
        while here and line.splitlines()[-1] != here.group(1):
            line += "\n" + next(lines)
        found += line.split(" && ") if line.startswith("pip install") else [line]
    return [line for line in found if line.strip()]


def commands(script, pages=(*PAGES, *OTHERS)):
    """What follows a script's name in all of its commands."""
    shell = [
        c for page in pages for language, text in blocks(page) if language == "bash" for c in shell_commands(text)
    ]
    return [c.split(script, 1)[1] for c in shell if script in c]


def parsed(command):
    """A training command's arguments, its presets and the pocket's defaults included, without looking for files."""
    return build_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("command", commands(TRAIN))
def test_training_command_parses(command):
    parsed(command)


@pytest.mark.parametrize("command", commands(EVALUATE))
def test_evaluation_command_parses(command):
    args = evaluate_one_step.build_parser().parse_args(shlex.split(command))
    evaluate_one_step.check_args(args)
    assert all(Contender.parse(entry) for entry in args.models)


def only_local(entries, name):
    """Rewards of a command as this machine can load them: one's own files, and a pocket scorer for all others."""
    entries = entries or ["image_reward"]  # the default where there is a reward
    own = [entry for entry in entries if ".py:" in entry]
    return [*([name] if len(own) < len(entries) else []), *own]


def shortened(command, model, prompts):
    """The words of a training command for the tiny model: one step, few pictures, nothing from the Hub."""
    given = parsed(command)
    own, generator = given.pretrained_model_name_or_path, given.pretrained_generator_name_or_path
    model = own if given.dry_run and own and Path(own).is_dir() else model  # a plan needs no weights
    dropped = {"--dataset_name", "--caption_column", "--variant", "--reward_checkpoint", "--push_to_hub"}
    dropped |= {"--pretrained_model_name_or_path", "--reward", "--heldout_reward"}
    dropped |= {"--resolution", "--embedded_guidance", "--reference_lora"}  # of the model that is named
    dropped |= {"--pretrained_generator_lora"} | (
        {"--timestep"} if given.timestep and given.timestep[0] > 999 else set()
    )
    if generator and not (Path(generator) / "model_index.json").is_file():  # else a command before made it
        dropped.add("--pretrained_generator_name_or_path")
    kept, words = [], shlex.split(command)
    while words:
        option = [words.pop(0)]
        while words and not words[0].startswith("--"):
            option.append(words.pop(0))
        kept += [] if option[0] in dropped else option
    if given.train_prompts is None:
        kept += ["--train_prompts", str(prompts), "--eval_prompts", str(prompts)]
    if given.heldout_reward or given.heldout_patience:
        kept += ["--heldout_reward", "pocket_heldout"]
    for name in ("pair_steps", "pretrain_steps", "max_train_steps", "ta_warmup_steps", "validation_steps"):
        kept += [f"--{name}", str(min(getattr(given, name), 1))]
    few = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "num_eval_prompts": 2, "num_eval_images": 2}
    few |= {"surrogate_group": 2, "num_pairs": 64}
    for name, value in {**few, "checkpointing_steps": 1, "report_to": "none"}.items():
        kept += [f"--{name}", str(value)]
    return [*kept, "--pretrained_model_name_or_path", model, "--reward", *only_local(given.reward, "pocket")]


def run_training(command, model, prompts):
    args = parse_args(shortened(command, model, prompts))
    train_diff_instruct_pp.main(args)
    AcceleratorState._reset_state(reset_partial_state=True)
    made = Path(args.output_dir) / "model_index.json"
    assert args.dry_run or made.is_file()


def run_evaluation(command):
    """With two prompts and two images; models that are on the Hub are parsed only, see above."""
    words = shlex.split(command)
    args = evaluate_one_step.build_parser().parse_args([*words, "--num_prompts", "2", "--num_images", "2"])
    if all(Contender.parse(entry).path.startswith("pocket/") for entry in args.models):
        evaluate_one_step.main(args)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert (Path(args.output_dir) / "evaluation.json").is_file()


def run_shell(command, model, prompts):
    if any(command.startswith(start) for start in NOT_RUN):
        for script in re.findall(r"\S+\.py\b", command):
            assert (ROOT / script).is_file(), command
            if not script.startswith(TRAIN):  # its own flags, those of scripts beside it, and those that it passes on
                text = (ROOT / script).read_text()
                beside = "".join(file.read_text() for file in (ROOT / script).parent.glob("*.py"))
                passed = build_parser()._option_string_actions if "parse_known_args" in text else {}
                flags = [flag for flag in re.findall(r"--[a-z0-9_]+", command) if flag not in passed]
                assert all(f'"{flag}"' in beside for flag in flags), command
    elif f" {TRAIN}" in command:
        launch, arguments = command.split(TRAIN, 1)
        for config in re.findall(r"--config_file (\S+)", launch):
            assert (ROOT / config).is_file(), command
        run_training(arguments, model, prompts)
    elif f" {EVALUATE}" in command:
        run_evaluation(command.split(EVALUATE, 1)[1])
    elif command.startswith("python export_for_apps.py"):
        export_for_apps.main(export_for_apps.build_parser().parse_args(shlex.split(command)[2:]))
    elif command.startswith("python demo.py"):  # it would serve until it is stopped: see tests/test_demo.py
        args = demo.build_parser().parse_args(shlex.split(command)[2:])
        if args.export_space:
            demo.export_space(args)
            assert (Path(args.export_space) / "app.py").is_file()
    elif command.startswith(("printf ", "cat > ")):
        subprocess.run(["bash", "-ec", command], check=True)
    else:
        raise AssertionError(f"neither run nor in NOT_RUN: {command}")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in PLANNED else page for page in PAGES]
)
def test_page_runs_from_top_to_bottom(page, tiny_model, tiny_pocket, tmp_path, monkeypatch, curves_drawn):
    """All commands and all Python of a page, one after the other, in one folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("pocket", "benchmarks", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    prompts = tmp_path / "tiny_prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    names = {"__name__": "page"}
    for language, text in blocks(page):
        if language == "bash":
            for command in shell_commands(text):
                run_shell(command, tiny_model, prompts)
        elif language == "python":
            exec(compile(text, page, "exec"), names)
        else:
            assert language == "bibtex", f"{page} has a block in {language}"


def test_ci_does_what_the_readme_says():
    """Its first line with one more argument, then its second, word for word, in the same checkout."""
    text = (ROOT / "README.md").read_text()
    first, second = (line for line in text.splitlines() if line.startswith("pip install") and " && " in line)
    assert "accelerate launch train_diff_instruct_pp.py --reward_scale 10 --cfg_scale 4.5" in first
    *_, run, tests = (ROOT / ".ci" / "run").read_text().splitlines()
    assert tests == second and re.fullmatch(re.escape(first) + r" --\w+ \d+", run)
    assert text.index(first) < text.index(second) < 3500  # of the first screen


def test_every_reason_is_needed():
    shell = [
        c for page in PAGES for language, text in blocks(page) if language == "bash" for c in shell_commands(text)
    ]
    assert [start for start in NOT_RUN if not any(c.startswith(start) for c in shell)] == []


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT)), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page):
    folders = "diff_instruct|experiments|benchmarks|tests|recipes|docs|pocket"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_named_flags_exist(page):
    parsers = [
        make()
        for make in (build_parser, evaluate_one_step.build_parser, export_for_apps.build_parser, demo.build_parser)
    ]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    known |= {
        "--config_file",
        "--quiet",
        "--logdir",
        "--machine_rank",
        "--main_process_ip",
        "--main_process_port",
        "--num_processes",
        "--use_fsdp",
        "--fsdp_version",
        "--no-deps",
        "--w",
        "--n",
        "--diffusion-model",
        "--vae",
    }  # accelerate's, TensorBoard's, pip's, stable-diffusion.cpp's, and those that other trainers' prompt files hold
    for folder in ("examples", "experiments", "benchmarks", "tests/parity"):
        known |= {flag for file in (ROOT / folder).glob("*.py") for flag in re.findall(r'"(--\w+)"', file.read_text())}
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for flag in {flag for code in re.findall(r"`([^`]+)`", text) for flag in re.findall(r"--[\w-]+", code)}:
        assert flag in known, f"{page} names {flag}"


def test_presets_are_as_the_page_says():
    """docs/methods.md names for each preset just what it sets."""
    rows = re.findall(r"^\| `(\S+)` \| .* \| `(--.*)` \|$", (ROOT / "docs" / "methods.md").read_text(), flags=re.M)
    choices = next(action.choices for action in build_parser()._actions if action.dest == "preset")
    assert [preset for preset, _ in rows] == list(choices)
    for preset, flags in rows:
        common = ["--train_prompts", __file__, "--reward", "pocket", "--output_dir", "not-made"]
        common += ["--pretrained_model_name_or_path", "any"]
        assert parse_args([*common, "--preset", preset]) == parse_args(
            [*common, *shlex.split(flags), "--preset", preset]
        )
        names = [word.removeprefix("--") for word in shlex.split(flags) if word.startswith("--")]
        defaults, with_preset = parse_args(common), parse_args([*common, "--preset", preset])
        changed = {k for k, v in vars(with_preset).items() if v != getattr(defaults, k)} - {"preset", "weighting"}
        assert changed <= set(names), preset


def test_the_metrics_of_a_run_are_defined(tiny_args, tmp_path):
    """Every figure that a run logs has its row in docs/logged_metrics.md."""
    own = tmp_path / "own.py"
    own.write_text("def light(pixels, prompts):\n    return pixels.mean(dim=(1, 2, 3))\n")
    rewards = ["--reward", "pocket", f"{own}:light", "--heldout_reward", "pocket_heldout", "--max_train_steps", "2"]
    train_diff_instruct_pp.main(parse_args([*tiny_args, *rewards, "--report_to", "none"]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    text = (ROOT / "docs" / "logged_metrics.md").read_text()
    defined = re.findall(r"`(\w+(?:<name>)?)`", "".join(re.findall(r"^\|(.*?)\|", text, flags=re.M)))
    patterns = [re.escape(name).replace("<name>", r"\w+") for name in defined]
    assert len(defined) == len(set(defined))
    for figure in {key for row in rows for key in row} - {"step"}:
        assert any(re.fullmatch(pattern, figure) for pattern in patterns), figure


def test_citation_is_whole():
    """What the Citation File Format 1.2.0 requires, and the paper."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cff.keys()
    assert cff["license"] == "Apache-2.0" and cff["references"][0]["url"].endswith("2410.18881")
    assert f'version = "{cff["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_notice_names_every_icon_set():
    """Whatever pocket/README.md says under Licences is named in NOTICE, which travels with a package."""
    notice = (ROOT / "NOTICE").read_text()
    licences = (ROOT / "pocket" / "README.md").read_text().split("## Licences")[1]
    links = re.findall(r"\]\((https://[^)]+)\)", licences)
    assert links and all(link in notice for link in links)


def test_the_bare_command_uses_the_pocket_reference(tmp_path):
    args = parse_args(["--reward_scale", "10", "--cfg_scale", "4.5", "--output_dir", str(tmp_path)])
    assert (args.reward, args.heldout_reward) == (["pocket"], ["pocket_heldout", "pocket_truth"])
    assert args.num_eval_prompts * args.num_eval_images >= 256
    assert models_of(args).timestep == 400


def test_ones_own_prompts_replace_the_pocket_s(tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("fire\n")
    args = parse_args(["--train_prompts", str(prompts), "--output_dir", str(tmp_path / "out")])
    assert args.train_prompts == str(prompts) and args.eval_prompts is None
    assert args.heldout_reward == ["pocket_heldout"]  # the truth measures sentences of the pocket only


def test_an_argument_given_wins_over_the_pocket_s_default(tmp_path):
    args = parse_args(["--learning_rate", "0.5", "--output_dir", str(tmp_path)])
    assert args.learning_rate == 0.5


def test_the_readme_s_prompt_file_needs_no_column():
    """The file that README.md makes is plain text, so none of its commands may name a column of it."""
    assert not any("my_prompts.txt" in c and "--caption_column" in c for c in commands(TRAIN))


def test_pocket_is_small_enough():
    files = [p for p in (ROOT / "pocket").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 40e6


def test_the_pipeline_imports_nothing_of_ours():
    source = (ROOT / "pipeline_one_step.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.M))
    known = "collections functools json os sys pathlib typing torch diffusers transformers"
    assert imported <= set(known.split())
