"""What a run does when something goes wrong: checkpoints, signals, full disks, numbers, memory, streams, trackers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diff_instruct.mistake import Mistake
from diff_instruct.training import interrupts
from diff_instruct.training.checkpoints import list_checkpoints, put_in_place
from diff_instruct.training.endings import Ending
from tests.processes import Run
from tests.runs import QUICK, checkpoints, history, run, same, weights
from tests.tiny import PROMPTS


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model, tiny_pocket):
    """(arguments, output folder) of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    arguments = [
        "--pretrained_model_name_or_path", tiny_model, "--train_prompts", folder / "prompts.txt",
        "--eval_prompts", folder / "prompts.txt", "--reward", "pocket", "--heldout_reward", "pocket_heldout",
        "--train_batch_size", 2, "--max_train_steps", 2, "--num_eval_images", 2, "--checkpointing_steps", 1, *QUICK,
        "--reward_checkpoint", f"pocket={tiny_pocket / 'scorer'}", f"pocket_heldout={tiny_pocket / 'scorer_heldout'}",
        "--output_dir", folder / "out",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "set_num_threads", lambda n: None)  # as in conftest.py
        run(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    return arguments, folder / "out"


def resume(written, tmp_path, *options):
    """Check the arguments of a resumed run, from a copy of the folder; trains nothing."""
    run([*written[0], "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest", *options, "--dry_run"])


def edit(file, change):
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


BROKEN = {
    r"generator_optimizer.safetensors is missing": lambda c: (c / "generator_optimizer.safetensors").unlink(),
    r"generator.safetensors has 100 of \d+ bytes": lambda c: os.truncate(c / "generator.safetensors", 100),
    r"loop-0.json is missing": lambda c: (c / "loop-0.json").unlink(),
    r"it has no checkpoint.json": lambda c: (c / "checkpoint.json").unlink(),
    r"its checkpoint.json cannot be read": lambda c: os.truncate(c / "checkpoint.json", 50),
    r"it has format 99, and this version": lambda c: edit(c / "checkpoint.json", lambda s: s.update(format=99)),
    r"was written by 2 process\(es\), but this run has 1.* has 4 images, as then, not 2": lambda c: edit(
        c / "checkpoint.json", lambda s: s.update(processes=2)
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(written, tmp_path, message):
    shutil.copytree(written[1], tmp_path / "out")
    resume(written, tmp_path)
    BROKEN[message](tmp_path / "out" / "checkpoint-2")
    with pytest.raises(Mistake, match=rf"--resume_from_checkpoint: \S*checkpoint-2 .*{message}") as error:
        resume(written, tmp_path)
    assert "\n" not in str(error.value)
    resume(written, tmp_path, "--resume_from_checkpoint", "checkpoint-1")


@pytest.mark.parametrize("name", ["generator.safetensors", "generator_optimizer.safetensors", "random_states_0.pkl"])
def test_a_damaged_file_of_the_right_size_is_a_mistake(written, tmp_path, name):
    shutil.copytree(written[1], tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-2" / name
    file.write_bytes(b"\x80" * file.stat().st_size)
    arguments = [*written[0], "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest"]
    with pytest.raises(Mistake, match="checkpoint-2 is damaged, or of other networks") as error:
        run(arguments)
    assert "\n" not in str(error.value)


def test_a_checkpoint_cannot_run_code(written, tmp_path):
    """Random numbers are not unpickled as objects; all else is no pickle."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    shutil.copytree(written[1], tmp_path / "out")
    checkpoint, name = tmp_path / "out" / "checkpoint-2", "random_states_0.pkl"
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors", ".pkl"}
    torch.save({"state": Evil()}, checkpoint / name)
    size = (checkpoint / name).stat().st_size
    edit(checkpoint / "checkpoint.json", lambda s: s["files"].update({name: size}))
    with pytest.raises(Mistake, match="is damaged"):
        run([*written[0], "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest"])
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (["--learning_rate", "0.5"], ["--learning_rate (then 5e-06, now 0.5)"]),
        (["--seed", "7", "--train_batch_size", "3"], ["--seed (then 0, now 7)", "--train_batch_size (then 2, now 3)"]),
        (["--mixed_precision", "bf16"], ["--mixed_precision (then no, now bf16)"]),
        (["--no-use_ema"], ["--use_ema (then True, now False)"]),
        (["--validation_prompts", "a b", "c"], ["--validation_prompts (then None, now 'a b' c)"]),
    ],
)
def test_other_arguments_are_refused_by_name(written, tmp_path, options, named):
    shutil.copytree(written[1], tmp_path / "out")
    with pytest.raises(Mistake, match="was written with other arguments") as error:
        resume(written, tmp_path, *options)
    assert all(words in str(error.value) for words in named) and str(error.value).count("(then") == len(named)


def test_arguments_that_do_not_matter_and_prompts_that_moved(written, tmp_path):
    shutil.copytree(written[1], tmp_path / "out")
    resume(written, tmp_path, "--max_train_steps", 9, "--logging_steps", 3, "--checkpointing_steps", 2)
    resume(written, tmp_path, "--report_to", "tensorboard", "--run_name", "x", "--cache_dir", tmp_path / "cache")
    moved = tmp_path / "moved.txt"
    shutil.copy(written[1].parent / "prompts.txt", moved)
    resume(written, tmp_path, "--train_prompts", moved)
    moved.write_text(moved.read_text() + "one more\n")
    with pytest.raises(Mistake, match=r"other arguments: --train_prompts \(other contents\)"):
        resume(written, tmp_path, "--train_prompts", moved)


def test_a_longer_run_is_the_run_of_that_length(written, tmp_path):
    """`--max_train_steps` may grow: the weights are those of a run that was longer from the start."""
    shutil.copytree(written[1], tmp_path / "out")
    command = [*written[0], "--max_train_steps", 3]
    run([*command, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest"])
    run([*command, "--output_dir", tmp_path / "whole"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_the_limit_never_removes_what_was_just_written(written, tmp_path):
    """Not even if a later one is there, and first what is not whole."""
    shutil.copytree(written[1], tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-8")
    (tmp_path / "out" / "checkpoint-8" / "loop-0.json").unlink()
    command = [*written[0], "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "checkpoint-2"]
    run([*command, "--max_train_steps", 3, "--checkpoints_total_limit", 2])
    assert checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]


def test_killed_while_a_checkpoint_is_replaced(tmp_path, monkeypatch):
    """Of a warm-up, whose checkpoints have one name: between the two renames the earlier one is found."""
    for name in ("checkpoint-0", "partial-checkpoint-0"):
        (tmp_path / name).mkdir()
    rename, calls = os.replace, []

    def killed(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(tmp_path / "partial-checkpoint-0", tmp_path / "checkpoint-0")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["old-checkpoint-0"]


def wait_for_rows(folder, number, runs):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and runs.alive:
        file = folder / "history.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= number:
            return
        time.sleep(0.01)
    raise AssertionError(runs.log.read_text()[-3000:])


def test_a_run_whose_launcher_is_gone_ends_with_a_checkpoint(quick_args, tmp_path, monkeypatch):
    """As by a SIGTERM of its own: accelerate's launcher of one process dies of it without passing it on."""
    monkeypatch.setattr(interrupts, "LAUNCHER", os.getppid() + 1)
    with pytest.raises(Ending, match="SIGTERM after step 1; .*checkpoint-1 is written") as error:
        run([*quick_args, "--checkpointing_steps", 0])
    assert error.value.code == 143 and checkpoints(tmp_path / "out") == ["checkpoint-1"]
    monkeypatch.setattr(interrupts, "LAUNCHER", os.getppid())
    run([*quick_args, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"])


@pytest.mark.slow
def test_sigterm_to_accelerate_launch(quick_args, tmp_path):
    """Of one process: the launcher ends with 143 at once, the run after its step, with a checkpoint."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "train_diff_instruct_pp.py"), *quick_args, "--max_train_steps", 4000]
    with log.open("w") as file:
        launcher = subprocess.Popen(
            [str(word) for word in [*command, "--checkpointing_steps", 0]],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        end = time.monotonic() + 300
        while not (out / "history.jsonl").exists() or len((out / "history.jsonl").read_text().splitlines()) < 4:
            assert launcher.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        launcher.terminate()
        assert launcher.wait(60) == -signal.SIGTERM  # which a shell shows as 143
    while "stopped: SIGTERM after step" not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)
    assert len(list_checkpoints(out)) == 1


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_signals_write_a_checkpoint(quick_args, tmp_path, number, processes):
    """To one process of two: both end after the same step, with 128 + the signal's number; the run then goes on."""
    command = [*quick_args, "--max_train_steps", 400, "--checkpointing_steps", 0, "--output_dir", tmp_path / "out"]
    started = Run(command, tmp_path / "log", processes)
    wait_for_rows(tmp_path / "out", 4, started)
    started.signal(number, rank=processes - 1)
    assert started.wait() == [128 + number] * processes
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    step, log = checkpoint.name.split("-")[1], (tmp_path / "log").read_text()
    assert f"stopped: {number.name} after step {step}; " in log and "Traceback" not in log
    loops = [json.loads(file.read_text())["step"] for file in checkpoint.glob("loop-*.json")]
    assert loops == [int(step)] * processes
    if processes == 1:
        total = int(step) + 2
        run([*command, "--max_train_steps", total, "--resume_from_checkpoint", "latest"])
        run([*command, "--max_train_steps", total, "--output_dir", tmp_path / "whole"])
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
        assert history(tmp_path / "whole") == history(tmp_path / "out")
