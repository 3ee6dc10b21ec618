"""SIGKILL at random moments, some of them inside the writing of a checkpoint: what is lost is nothing."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import load
from safetensors.torch import load_file

from tests.processes import Run
from tests.runs import history, same, weights


def last_state(folder, step):
    """All that the last checkpoint holds, by file: tensors, and plain values without the clock."""
    files = sorted((Path(folder) / f"checkpoint-{step}").iterdir())
    state = {}
    for file in files:
        if file.suffix == ".safetensors":
            state[file.name] = load_file(file)
        elif file.suffix in (".bin", ".pkl"):
            state[file.name] = load(file)
        elif file.name.startswith("loop-"):
            state[file.name] = {k: v for k, v in json.loads(file.read_text()).items() if k != "seconds"}
    return state


def assert_equal(a, b, where=""):
    """Bit for bit, through dictionaries, lists and tuples."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif hasattr(a, "tolist"):
        assert a.tolist() == b.tolist(), where
    else:
        assert a == b, where


def rows(folder):
    file = Path(folder) / "history.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def kill_somewhere(run, folder, rng, inside_a_write):
    """Wait for some progress, then kill: as soon as a checkpoint is being written, or at any moment of a step.

    Returns:
        Whether a checkpoint was left half written; None if the run ended before.
    """
    deadline, wanted = time.monotonic() + 300, rows(folder) + rng.randint(1, 4)
    while run.alive and time.monotonic() < deadline:
        writes = any(folder.glob("partial-checkpoint-*"))
        if writes if inside_a_write else rows(folder) >= wanted:
            break
        time.sleep(0.001)
    time.sleep(rng.random() * (0.004 if inside_a_write else 0.3))
    if not run.alive:
        run.wait()
        return None
    run.kill()
    return any(folder.glob("partial-checkpoint-*"))


def kill_and_compare(command, tmp_path, steps, kills, processes=1, seed=0, environment=None):
    """A run that is killed so often ends as one that never was; returns (kills, those inside a write)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [
        *command,
        "--checkpointing_steps",
        1,
        "--checkpoints_total_limit",
        2,
        "--resume_from_checkpoint",
        "latest",
    ]
    assert set(Run([*command, "--output_dir", whole], tmp_path / "whole.log", processes, environment).wait()) == {0}
    rng, counts = random.Random(seed), []
    log = tmp_path / "killed.log"
    for i in range(kills):
        run = Run([*command, "--output_dir", killed], log, processes, environment)
        half = kill_somewhere(run, killed, rng, inside_a_write=i % 2 == 1)
        if half is None:
            break
        counts.append(half)
    codes = Run([*command, "--output_dir", killed], log, processes, environment).wait()
    assert set(codes) == {0}, log.read_text()[-3000:]
    assert same(weights(whole), weights(killed))
    assert history(whole) == history(killed)
    assert_equal(last_state(whole, steps), last_state(killed, steps))
    assert not list(killed.glob("*removed*"))
    return len(counts), sum(counts)


def test_killed_twice(tiny_args, tmp_path):
    """Once between two checkpoints, once in the writing of one; pretraining and alignment, one base for all roles."""
    options = ["--pretrain_steps", 3, "--max_train_steps", 15, "--lora_rank", 2, "--ta_lora_rank", 2]
    options += ["--report_to", "none", "--num_eval_prompts", 2, "--validation_steps", 0]
    kills, _ = kill_and_compare([*tiny_args, *options], tmp_path, 18, kills=2)
    assert kills == 2


MODES = {
    "pretrain and align, full": (1, 16, ["--pretrain_steps", 6, "--max_train_steps", 10]),
    "one base for all roles": (
        1, 16,
        ["--pretrain_steps", 4, "--max_train_steps", 12, "--lora_rank", 2, "--ta_lora_rank", 2,
         "--lr_scheduler", "cosine", "--lr_warmup_steps", 3],
    ),
    "warm-up of the TA": (
        1, 12,
        ["--ta_warmup_steps", 4, "--max_train_steps", 12, "--ta_steps", 2, "--gradient_accumulation_steps", 2,
         "--ta_lora_rank", 2],
    ),
    "three generator steps, diffused reward": (
        1, 14, ["--pretrain_steps", 4, "--max_train_steps", 10, "--generator_steps", 3, "--preset", "didr"]
    ),
    "two processes, full": (2, 14, ["--pretrain_steps", 4, "--max_train_steps", 10]),
    "two processes, one base, warm-up": (
        2, 12, ["--ta_warmup_steps", 3, "--max_train_steps", 12, "--lora_rank", 2, "--ta_lora_rank", 2]
    ),
    "two processes, FSDP2": (2, 12, ["--pretrain_steps", 4, "--max_train_steps", 8, "--ta_lora_rank", 2]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(tiny_args, tmp_path, mode, record_property):
    """Four kills of each mode, every other one as soon as a checkpoint is being written."""
    processes, steps, options = MODES[mode]
    command = [*tiny_args, *options, "--num_eval_prompts", 2, "--validation_steps", 4]
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if "FSDP2" in mode else None
    kills, inside = kill_and_compare(command, tmp_path, steps, 4, processes, len(mode), environment)
    print(f"\n{mode}: {kills} kills, {inside} of them left a checkpoint half written")
    assert kills == 4
