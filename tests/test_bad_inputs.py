"""Bad input to both command lines: one line that names the argument and says what to do, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import evaluate_one_step
import train_diff_instruct_pp as train
from diff_instruct.command_line import text
from diff_instruct.mistake import Mistake
from diff_instruct.training.arguments import build_parser, parse_args
from tests.tiny import tiny_sd


ROOT = Path(__file__).resolve().parents[1]
PARSERS = {"train": build_parser(), "evaluate": evaluate_one_step.build_parser()}


def flags(script):
    """The flags of a script that take a value, with their actions."""
    return {a.option_strings[0]: a for a in PARSERS[script]._actions if a.option_strings and a.nargs != 0}


NO_NUMBER = ["nan", "inf", "-inf", "-1", "text", "", "0x10"]  # no numeric flag takes one of these
OUT_OF_RANGE = {
    "0": """generator_steps resolution max_train_samples shuffle_buffer_size num_eval_prompts num_eval_images
        num_validation_prompts reward_ratio reward_ratio_steps huber_c diffused_reward_steps ta_steps reward_batch_size
        train_batch_size gradient_accumulation_steps learning_rate ta_learning_rate lora_alpha ta_lora_alpha
        adam_epsilon max_grad_norm ema_halflife ema_rampup_ratio checkpoints_total_limit logging_steps
        num_prompts num_images batch_size grid_prompts""",
    "1": "adam_beta1 adam_beta2 ema_decay num_eval_images",
    "1.5": """
        adam_beta1 adam_beta2 ema_decay min_timestep max_timestep timestep generator_steps max_train_steps ta_steps
        train_batch_size lora_rank seed checkpointing_steps""",
    "9": "generator_steps",
    "4294967296": "seed",
    "9" * 30: "max_train_steps resolution",
}


def bad_values(flag, action):
    """What this flag must not be given, as words; none at all is one of them."""
    values = [value for value, names in OUT_OF_RANGE.items() if flag[2:] in names.split()]
    if action.choices:
        values += ["nonsense", ""]
    elif action.type is text:
        values += ["", " "]
    else:
        values += NO_NUMBER
    return [[flag], *([f"{flag}={value}"] for value in values)]


MALFORMED = {(s, flag): bad_values(flag, a) for s in PARSERS for flag, a in flags(s).items()}
AT_9 = ["--timestep", "9"]

TABLE = [
    # not flags
    ("train", ["--reward", "pocket", "--rewrad_scale", "1"], "unknown argument --rewrad_scale: .*--reward_scale"),
    ("train", ["--reward_s", "1"], "unknown argument --reward_s: did you mean --reward_scale"),
    ("train", ["--lora=4"], "unknown argument --lora: did you mean --lora_rank or --lora_alpha"),
    ("train", ["--hub_tok=hf_secret"], "unknown argument --hub_tok: did you mean --hub_token"),
    ("train", ["--qqq"], "unknown argument --qqq: see --help"),
    ("train", ["--dry_run", "yes"], "quote values that hold spaces"),
    ("evaluate", ["--model", "a=b"], "unknown argument --model: did you mean --models"),
    ("evaluate", ["--resolution", "64", "128"], "quote values that hold spaces"),
    # what does not go together
    ("train", ["--dataset_name", "owner/name"], "either --dataset_name or --train_prompts"),
    ("train", ["--divergence", "score", "--reward_mode", "diffused"], "--reward_mode diffused needs"),
    ("train", ["--min_timestep", "0.5", "--max_timestep", "0.5"], "--min_timestep must be"),
    ("train", ["--cfg_interval", "0.5", "0.2"], "--cfg_interval: the first fraction must be less"),
    ("train", ["--cfg_interval", "0.5", "1.2"], "a number from 0 to 1"),
    ("train", ["--reward_ratio", "1", "--reward_scale", "2"], "--reward_scale"),
    ("train", ["--reward", "none", "--reward_ratio", "2"], "needs no --reward_ratio, but --reward_scale 0"),
    ("train", ["--lora_target_modules", "to_q"], "give --lora_rank or --ta_lora_rank, too"),
    ("train", ["--timestep", "400", "500"], "--timestep 400 500 must descend"),
    ("train", ["--timestep", "400", "300", "--generator_steps", "3"], "--generator_steps is 3"),
    ("train", ["--timestep", *"987654321"], "at most 8"),
    ("train", ["--heldout_patience", "2", "--validation_steps", "0"], "--heldout_patience needs"),
    ("train", ["--lr_scheduler", "piecewise_constant"], "--lr_scheduler"),
    ("train", ["--lora_alpha", "4"], "--lora_alpha scales a LoRA: give --lora_rank, too"),
    ("train", ["--memory_gib", "24"], "give --dry_run, too"),
    ("train", ["--report_to", "notepad"], "--report_to notepad: take"),
    ("evaluate", ["--dataset_name", "owner/name"], "either --prompts or --dataset_name"),
    ("evaluate", ["--num_images", "4", "--batch_size", "2"], "--batch_size must be at least --num_images"),
    ("evaluate", ["--baseline", "nobody"], "--baseline nobody: no model of this name"),
    ("evaluate", ["--models", "nothing"], "--models nothing: write NAME=PATH"),
    ("evaluate", ["--models", "a={model}", "a={model}"], "`a` is given twice"),
    ("evaluate", ["--models", "a={model},steps=many,guidance=2"], "steps must be a number"),
    ("evaluate", ["--models", "a={model},steps=2,guidance=2,colour=red"], "unknown option `colour`"),
    ("evaluate", ["--models", "a={model},steps=1,guidance=2"], "steps must be at least 2"),
    ("evaluate", ["--models", "a={model},steps=4"], "steps and guidance belong together"),
    # rewards
    ("train", ["--reward", "beauty"], "unknown reward `beauty`"),
    ("train", ["--reward", "clip:much"], "--reward clip:much: after the colon"),
    ("train", ["--reward", "clip:nan"], "--reward clip:nan: after the colon"),
    ("train", ["--reward", "clip:"], "--reward clip:: after the colon"),
    ("train", ["--reward", "clip", "clip"], "`clip` is given twice"),
    ("train", ["--reward", "/nowhere/a.py:f"], "no such file: /nowhere/a.py"),
    ("train", ["--reward", "{tmp}/folder.py:f"], "no such file"),
    ("train", ["--reward", "{tmp}/syntax.py:"], "comes the name of a function"),
    ("train", ["--reward", "{tmp}/syntax.py:f"], "syntax.py cannot be imported: SyntaxError"),
    ("train", ["--reward", "{tmp}/script.py:f"], "script.py cannot be imported: SystemExit: 2"),
    ("train", ["--reward", "{tmp}/exits.py:f"], "exits.py:f` failed: SystemExit: no key .line 5 of exits.py"),
    ("train", ["--reward", "{tmp}/raises.py:f"], "raises.py:f.*KeyError"),
    ("train", ["--reward", "{tmp}/raises.py:g"], "has no function `g`"),
    ("train", ["--heldout_reward", "pocket"], "`pocket` is given twice"),
    ("train", ["--reward_cap", "pocket"], "--reward_cap pocket: write name=value"),
    ("train", ["--reward_cap", "pocket=nan"], "--reward_cap pocket=nan"),
    ("train", ["--reward_cap", "pocket=1", "pocket=2"], "--reward_cap: `pocket` is given twice"),
    ("train", ["--reward_cap", "clip=1"], "--reward_cap: `clip` is not in --reward; write pocket"),
    ("train", ["--reward_standardize", "{tmp}/raises.py:f"], "raises.py:f` is not in --reward; write pocket"),
    ("train", ["--reward_checkpoint", "pocket=/nowhere"], "--reward_checkpoint pocket=/nowhere: no such"),
    ("train", ["--reward_checkpoint", "beauty=/"], "--reward_checkpoint: unknown reward `beauty`"),
    ("train", ["--reward_checkpoint", "pocket={model}"], "--reward_checkpoint pocket"),
    ("train", ["--reward", "hpsv2", "--reward_checkpoint", "hpsv2={tmp}/noise.bin"], "noise.bin is damaged"),
    ("evaluate", ["--rewards", "beauty"], "unknown reward `beauty`"),
    ("evaluate", ["--rewards", "clip", "clip"], "`clip` is given twice"),
    ("evaluate", ["--reward_checkpoint", "clip"], "--reward_checkpoint clip: write name=value"),
    # files
    ("train", ["--train_prompts", "/nowhere/p.txt"], "--train_prompts: no such file"),
    ("train", ["--eval_prompts", "/nowhere/p.txt"], "--eval_prompts: no such file"),
    ("train", ["--train_prompts", "{tmp}/empty.txt"], "empty.txt is empty"),
    ("train", ["--train_prompts", "{tmp}/blank.txt"], "blank.txt"),
    ("train", ["--train_prompts", "{tmp}/noise.parquet"], "noise.parquet cannot be read"),
    ("train", ["--train_prompts", "{tmp}/noise.json"], "noise.json"),
    ("train", ["--train_prompts", "{tmp}/folder.py"], "folder.py must hold files"),
    ("train", ["--caption_column", "nonsense"], "no column `nonsense`"),
    ("train", ["--train_prompts", "{tmp}/words.docx"], "words.docx must hold files of one of .txt"),
    ("train", ["--output_dir", "{tmp}/empty.txt"], "--output_dir"),
    ("train", ["--output_dir", "{tmp}/empty.txt/below"], "--output_dir"),
    ("train", ["--resume_from_checkpoint", "nonsense"], "--resume_from_checkpoint: nonsense is not a finished"),
    ("train", ["--resume_from_checkpoint", "{tmp}/folder.py"], "--resume_from_checkpoint"),
    ("train", ["--pretrained_model_name_or_path", "/nowhere/model"], "/nowhere/model"),
    ("train", ["--pretrained_model_name_or_path", "{tmp}/empty.txt"], "empty.txt"),
    ("train", ["--pretrained_model_name_or_path", "{tmp}/folder.py"], "folder.py has no model_index.json"),
    ("train", ["--pretrained_model_name_or_path", "{tmp}/binary_index"], "binary_index"),
    ("train", ["--pretrained_vae_model_name_or_path", "/nowhere/vae"], "/nowhere/vae"),
    ("train", ["--reward_decoder", "/nowhere/taesd"], "--reward_decoder /nowhere/taesd"),
    ("train", ["--reward_decoder", "{tmp}/folder.py"], "--reward_decoder"),
    ("train", ["--pretrained_generator_name_or_path", "/nowhere/a.safetensors"], "there is no file /nowhere"),
    ("train", ["--pretrained_generator_name_or_path", "{tmp}/folder.py"], "is neither a pipeline"),
    ("train", ["--pretrained_generator_name_or_path", "{tmp}/noise.safetensors", *AT_9], "noise.safetensors"),
    ("train", ["--pretrained_generator_name_or_path", "{tmp}/noise.bin", *AT_9], "noise.bin"),
    ("train", ["--pretrained_generator_name_or_path", "{tmp}/code.bin", *AT_9], "code.bin"),
    ("train", ["--pretrained_generator_name_or_path", "{tmp}/other.safetensors", *AT_9],
     "other.safetensors does not fit the reference"),
    ("train", ["--pretrained_generator_name_or_path", "{sd}/unet", *AT_9], "is a UNet2DCondition"),
    ("train", ["--resolution", "17"], "--resolution 17 cannot be made"),
    ("train", ["--timestep", "1000"], "--timestep 1000 is outside the schedule"),
    ("evaluate", ["--prompts", "/nowhere/p.txt"], "--prompts /nowhere/p.txt: neither"),
    ("evaluate", ["--prompts", "{tmp}/empty.txt"], "empty.txt is empty"),
    ("evaluate", ["--prompts", "{tmp}/noise.parquet"], "noise.parquet"),
    ("evaluate", ["--category_column", "nonsense"], "no column `nonsense`"),
    ("evaluate", ["--models", "a=/nowhere/model,steps=2,guidance=2"], "/nowhere/model"),
    ("evaluate", ["--models", "a={tmp}/folder.py"], "folder.py has no model_index.json"),
    ("evaluate", ["--models", "a={tmp}/noise.safetensors,base={model},timestep=9"], "noise.safetensors"),
    ("evaluate", ["--models", "a={tmp}/other.safetensors,base={model},timestep=9"], "other.safetensors does not fit"),
    ("evaluate", ["--output_dir", "{tmp}/empty.txt"], "--output_dir"),
    ("evaluate", ["--resolution", "17"], "--resolution 17 cannot be made"),
]  # fmt: skip


class Code:
    """What a pickle can do: runs when it is read."""

    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of empty, blank, binary, foreign and dangerous files, and another model's."""
    folder = tmp_path_factory.mktemp("bad")
    noise = bytes(torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    for ending in ("safetensors", "bin", "parquet", "json"):
        (folder / f"noise.{ending}").write_bytes(noise)
    for name, content in (
        ("empty.txt", ""),
        ("blank.txt", "\n \n\t\n" * 50),
        ("words.docx", "a red apple"),
        ("syntax.py", "def f(:\n"),
        ("script.py", "import argparse\nargparse.ArgumentParser().parse_args(['--of-another', 'script'])\n"),
        ("exits.py", "import sys\n\n\ndef f(pixels, prompts):\n    sys.exit('no key')\n"),
        ("raises.py", "def f(pixels, prompts):\n    return {}['score']\n"),
    ):
        (folder / name).write_text(content)
    (folder / "folder.py").mkdir()
    (folder / "binary_index").mkdir()
    (folder / "binary_index" / "model_index.json").write_bytes(noise)
    torch.save(Code(), folder / "code.bin")
    save_file({"conv_in.weight": torch.zeros(4, 4)}, folder / "other.safetensors")
    tiny_sd(folder / "sd")
    return folder


@pytest.fixture
def command(tiny_args, tiny_model, bad_files, tmp_path):
    """(script, more words) to what the script is called with; `{tmp}`, `{model}` and `{sd}` are filled in."""
    prompts = tiny_args[tiny_args.index("--train_prompts") + 1]
    valid = {
        "train": [*tiny_args, "--report_to", "none"],
        "evaluate": ["--models", f"a={tiny_model},steps=2,guidance=2", "--prompts", prompts, "--rewards", "pocket",
                     "--num_images", "2", "--output_dir", str(tmp_path / "out")],
    }  # fmt: skip
    places = {"tmp": bad_files, "model": tiny_model, "sd": bad_files / "sd"}
    return lambda script, words: [*valid[script], *(w.format(**places) for w in words)]


def call(script, words):
    if script == "train":
        train.main(parse_args(words))
    else:
        evaluate_one_step.main(evaluate_one_step.build_parser().parse_args(words))


def everything(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_line(error):
    line = str(error.value)
    assert "\n" not in line and len(line) < 600 and "hf_secret" not in line


@pytest.mark.parametrize("script, flag", MALFORMED)
def test_every_flag_says_its_range(script, flag):
    for words in MALFORMED[script, flag]:
        with pytest.raises(Mistake, match=f"{flag}\\b") as error:
            PARSERS[script].parse_args(words)
        check_line(error)


def test_there_are_enough():
    assert len(TABLE) + sum(map(len, MALFORMED.values())) >= 400


@pytest.mark.parametrize("script, words, message", TABLE, ids=lambda x: None if isinstance(x, str) else " ".join(x))
def test_one_line_and_nothing_written(command, tmp_path, monkeypatch, script, words, message):
    monkeypatch.chdir(tmp_path)
    words, before = command(script, words), everything(tmp_path)
    with pytest.raises(Mistake, match=message) as error:
        call(script, words)
    check_line(error)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "script, words",
    [
        ("train_diff_instruct_pp.py", ["--reward_scale", "nan"]),
        pytest.param("evaluate_one_step.py", ["--num_images", "0"], marks=pytest.mark.slow),
    ],
)
def test_the_process_prints_one_line_and_fails(script, words, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1 and lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert "usage:" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "files, options, message",
    [
        (["training_summary.json"], [], "a finished run"),
        (["checkpoint-2/loop-0.json"], [], "checkpoint-2"),
        (["training_summary.json", "checkpoint-2/loop-0.json"], [], "--resume_from_checkpoint latest"),
    ],
)
def test_another_run_is_not_overwritten(tiny_args, tmp_path, files, options, message):
    for name in files:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    before = everything(tmp_path)
    with pytest.raises(Mistake, match=message) as error:
        call("train", [*tiny_args, *options])
    assert "--overwrite_output_dir" in str(error.value) and everything(tmp_path) == before
    assert parse_args([*tiny_args, "--overwrite_output_dir"]).output_dir == str(tmp_path / "out")
    if "checkpoint-2/loop-0.json" in files:
        assert parse_args([*tiny_args, "--resume_from_checkpoint", "latest"])
