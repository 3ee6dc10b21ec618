"""What a run does when something goes wrong on the way: numbers, memory, prompts, disk, trackers."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train_diff_instruct_pp as script
from diff_instruct.mistake import Mistake
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.plan import advice
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.prompts.stream import Sampler, StreamBroken
from diff_instruct.rewards.mix import Mix
from diff_instruct.terms import IKL
from diff_instruct.training import endings
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.endings import Ending, run_to_the_end
from diff_instruct.training.history import History
from diff_instruct.training.nonfinite import NonFinite
from tests.runs import checkpoints, history, run, same, trained, weights
from tests.tiny import PROMPTS


def ends(arguments, capsys):
    """(exit code, last line on stderr) of the script's last lines; no traceback."""
    code = run_to_the_end(lambda: parse_args([str(a) for a in arguments]), script.main)
    return code, capsys.readouterr().err.splitlines()[-1]


REWARD = """
import torch
calls = []

def score(pixels, prompts):
    r = pixels.mean(dim=(1, 2, 3))
    if pixels.requires_grad and pixels.shape[-1] == 16:
        calls.append(1)
        if len(calls) in {calls}:
            r = r * float("nan")
    return r

def root(pixels, prompts):
    r = pixels if pixels.shape[-1] > 16 else (pixels - pixels.detach()).sqrt()
    return r.mean(dim=(1, 2, 3))
"""


def test_a_reward_that_is_not_finite_is_named_and_skipped(quick_args, tmp_path, capsys):
    """One bad step is not applied; the next is."""
    (tmp_path / "own.py").write_text(REWARD.replace("{calls}", "{2}"))
    run([*quick_args, "--reward", "pocket", f"{tmp_path}/own.py:score", "--checkpointing_steps", 1])
    out = capsys.readouterr().out
    assert (
        "the gradient of the generator was not finite in step 2 (not finite: reward score); it is not applied" in out
    )
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["skipped_steps"] == 1
    states = [trained(tmp_path / "out", i) for i in (1, 2, 3)]
    assert same(states[0], states[1]) and not same(states[1], states[2])
    assert not (tmp_path / "out" / "nonfinite_prompts.json").exists()


@pytest.mark.parametrize("function, cause", [("score", "reward score"), ("root", "reward root")])
def test_three_in_a_row_end_the_run(quick_args, tmp_path, capsys, function, cause):
    """NaN scores, and finite scores whose gradient is infinite; the prompts of the last bad batch are kept."""
    (tmp_path / "own.py").write_text(REWARD.replace("{calls}", "range(2, 9)"))
    options = [
        "--reward",
        "pocket",
        f"{tmp_path}/own.py:{function}",
        "--max_train_steps",
        9,
        "--checkpointing_steps",
        1,
    ]
    code, line = ends([*quick_args, *options, "--max_nonfinite_steps", 2], capsys)
    step = {"score": 3, "root": 2}[function]
    assert code == 3 and f"not finite in step {step} (not finite: {cause}), 2 times in a row" in line
    bad = json.loads((tmp_path / "out" / "nonfinite_prompts.json").read_text())
    assert (bad["step"], bad["network"], bad["not_finite"]) == (step, "generator", [cause])
    assert len(bad["prompts"]) == 4 and set(bad["prompts"]) <= set(PROMPTS)  # the TA's batch and the generator's
    assert checkpoints(tmp_path / "out")[-1] == f"checkpoint-{step - 1}"
    assert all(v.isfinite().all() for v in trained(tmp_path / "out", step - 1).values())


@pytest.mark.parametrize("part, cause", [("ta_loss", "TA loss"), ("score", "divergence"), ("cfg", "guidance")])
def test_what_is_not_finite_is_named(quick_args, monkeypatch, capsys, part, cause):
    nan = float("nan")
    if part == "ta_loss":
        loss = Denoiser.loss
        monkeypatch.setattr(Denoiser, "loss", lambda *args: loss(*args) * nan)
    else:
        gradient, name = IKL.gradient, {"score": "divergence", "cfg": "cfg"}[part]
        parts = lambda *args: {k: v * (nan if k == name else 1) for k, v in gradient(*args).items()}  # noqa: E731
        monkeypatch.setattr(IKL, "gradient", parts)
    code, line = ends([*quick_args, "--max_nonfinite_steps", 1], capsys)
    assert code == 3 and f"not finite in step 1 (not finite: {cause}), 1 times" in line


def test_nothing_is_asked_of_finite_steps(quick_args, monkeypatch):
    """No extra wait for the device: what is finite is looked at only after a step that was not taken."""
    monkeypatch.setattr(Mix, "take_unsound", None)
    monkeypatch.setattr(NonFinite, "__call__", None)
    run([*quick_args, "--max_train_steps", 1])


def fake_plan(args, models, precision):
    """GiB of a large model, by the arguments."""
    frozen, adam = (2, 4)[precision != "bf16"], (2, 8)[not args.use_8bit_adam]
    actors = {"reference": frozen, "text_encoder": 2 * frozen}
    for name, rank, ema in (("generator", args.lora_rank, args.use_ema), ("teaching assistant", args.ta_lora_rank, 0)):
        actors[name] = 0.1 if rank else 8 + adam + 4 * ema
    return {name: {"weights": gib * 2**30} for name, gib in actors.items()}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] can't allocate memory: 64 bytes")],
)
@pytest.mark.parametrize(
    "options, largest, flags",
    [
        ([], "generator (20.00 of 48.00", "--lora_rank 64, --ta_lora_rank 64, --gradient_checkpointing"),
        (
            ["--lora_rank", 2, "--gradient_checkpointing"],
            "teaching assistant (16.00 of 28.10",
            "--ta_lora_rank 64, --mixed_precision bf16, --reward_batch_size 1",
        ),
        (
            ["--lora_rank", 2, "--ta_lora_rank", 2, "--mixed_precision", "bf16", "--reward_batch_size", 1,
             "--gradient_checkpointing"],
            "text_encoder (4.00 of 6.20",
            "--train_batch_size 1 --gradient_accumulation_steps 2, --reward_dtype bf16",
        ),
    ],
)  # fmt: skip
def test_out_of_memory_names_the_largest_actor_and_flags(
    quick_args, monkeypatch, capsys, error, options, largest, flags
):
    def full(*args):
        raise error

    monkeypatch.setattr(Denoiser, "loss", full)
    monkeypatch.setattr(advice, "plan", fake_plan)
    code, line = ends([*quick_args, *options], capsys)
    assert code == 4 and line.startswith(f"stopped: out of memory: the largest actor is the {largest} GiB")
    assert line.endswith(f"what would help most: {flags}")


def test_other_errors_keep_their_traceback(quick_args, monkeypatch):
    def bug(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Denoiser, "loss", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run_to_the_end(lambda: parse_args([str(a) for a in quick_args]), script.main)


def test_an_interrupt_while_prompts_are_encoded(quick_args, tmp_path, monkeypatch, capsys):
    """Before the first step: one line, no traceback, and what was encoded is kept."""
    prepare = Conditioning.prepare
    calls = []

    def interrupted(encode, prompts):
        calls.append(encode)
        if len(calls) == 2:  # the first are those to judge with
            raise KeyboardInterrupt
        prepare(encode, prompts)

    monkeypatch.setattr(Conditioning, "prepare", interrupted)
    code, line = ends([*quick_args, "--prompt_cache", tmp_path / "cache"], capsys)
    assert code == 130 and line.startswith("stopped: SIGINT; what is written stays") and "latest" in line
    assert list(tmp_path.glob("cache/*/*.safetensors"))


def test_a_stream_that_breaks_leaves_a_checkpoint(quick_args, tmp_path, monkeypatch, capsys):
    """What its prompts' reader raises after its own attempts; the run can be continued, and ends the same."""
    run([*quick_args, "--output_dir", tmp_path / "whole"])
    read_ahead, calls = Sampler.read_ahead, []

    def broken(self, draws):
        calls.append(draws)
        if len(calls) == 3:
            raise StreamBroken("the prompts cannot be read (ConnectionError: gone), after 5 attempts")
        read_ahead(self, draws)

    with monkeypatch.context() as m:
        m.setattr(Sampler, "read_ahead", broken)
        code, line = ends([*quick_args, "--checkpointing_steps", 0], capsys)
    assert code == 75 and "ConnectionError: gone" in line and "go on with --resume_from_checkpoint latest" in line
    assert checkpoints(tmp_path / "out") == ["checkpoint-3"]
    run([*quick_args, "--resume_from_checkpoint", "latest"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB, which root mounts: this user, or `sudo` where it asks for no password."""
    folder = tmp_path / "disk"
    folder.mkdir()
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*as_root, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which(mount[0]) is None:
        pytest.skip(f"a small file system needs {mount[0]}, which is not here")
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system can only be mounted with root's rights: {done.stderr.strip()}")
    yield folder
    subprocess.run([*as_root, "umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(quick_args, small_disk, monkeypatch, capsys):
    """It fills while the run goes on: checkpoints that cannot be written are told, the last whole one stays,
    the export ends with one line; with room again the same command ends as a run with room does."""
    out, loss, filler = small_disk / "out", Denoiser.loss, small_disk / "filler"
    command = [*quick_args, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    run([*command, "--output_dir", out, "--max_train_steps", 1])
    before = weights_of(out / "checkpoint-1")
    for name in ("transformer", "vae", "text_encoder"):
        shutil.rmtree(out / name)
    fills = lambda *args: (filler.exists() or fill(filler), loss(*args))[1]  # noqa: E731
    with monkeypatch.context() as m:
        m.setattr(Denoiser, "loss", fills)
        code = run_to_the_end(lambda: parse_args([str(a) for a in [*command, "--output_dir", out]]), script.main)
    said = capsys.readouterr()
    assert code == 5 and said.err.splitlines()[-1].startswith(f"stopped: the export in {out} could not be written: no")
    for step in (2, 3, 4):
        assert f"checkpoint-{step} could not be written: " in said.out
    assert checkpoints(out) == ["checkpoint-1"] and same(weights_of(out / "checkpoint-1"), before)
    filler.unlink()
    run([*command, "--output_dir", out])
    run([*command, "--output_dir", small_disk.parent / "whole"])
    assert same(weights(out), weights(small_disk.parent / "whole"))
    assert history(out) == history(small_disk.parent / "whole")


def fill(file):
    with pytest.raises(OSError), file.open("wb", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)


def weights_of(checkpoint):
    return load_file(checkpoint / "generator.safetensors")


def test_log_lines_that_could_not_be_written_come_with_the_next(tmp_path, monkeypatch, capsys):
    log, accelerator = History(tmp_path), Accelerator()
    log.log(accelerator, 0, {"a": 1.0})
    opened = Path.open

    def full(self, *args):
        f = opened(self, *args)
        write = f.write

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *args):
                f.close()

            def __getattr__(self, name):
                return getattr(f, name)

            def write(self, data):
                write(data[: len(data) // 2])
                f.flush()
                raise OSError(28, "No space left on device")

        return Half()

    with monkeypatch.context() as m:
        m.setattr(Path, "open", full)
        log.log(accelerator, 1, {"a": 2.0})
        log.log(accelerator, 2, {"a": 3.0})
    assert capsys.readouterr().out.count("could not be written: no space left on the disk; the run goes on") == 1
    log.log(accelerator, 3, {"a": 4.0})
    assert [row["a"] for row in history(tmp_path)] == [1.0, 2.0, 3.0, 4.0]
    with (tmp_path / "history.jsonl").open("a") as f:
        f.write('{"step": 4, "a"')  # killed in the middle
    assert (
        [row["step"] for row in History(tmp_path, first_step=2).rows]
        == [0, 1, 2]
        == [row["step"] for row in history(tmp_path)]
    )


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(quick_args, tmp_path, monkeypatch, capsys):
    from diff_instruct.models import tensors as module

    save, calls = module.write_tensors, []

    def full(*args):
        calls.append(1)
        if len(calls) == 7:  # the teaching assistant's of the second
            raise OSError(28, "No space left on device")
        return save(*args)

    monkeypatch.setattr(module, "write_tensors", full)
    run([*quick_args, "--checkpointing_steps", 1])
    out = capsys.readouterr().out
    assert "checkpoint-2 could not be written: no space left on the disk; the last one is checkpoint-1." in out
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_trackers_go_on_in_the_same_run(quick_args, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, name, config, init_kwargs: asked.append(init_kwargs)
    )
    command = [*quick_args, "--report_to", "tensorboard", "--run_name", "red", "--tracker_group", "apples"]
    run([*command, "--max_train_steps", 2])
    run([*command, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"])
    run([*command, "--max_train_steps", 3, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2",
         "--output_dir", tmp_path / "moved"])  # fmt: skip
    run([*command, "--max_train_steps", 1, "--output_dir", tmp_path / "other"])
    first, second, moved, other = asked
    assert first == second == moved and first["wandb"]["id"] != other["wandb"]["id"]
    run_id = first["wandb"]["id"]
    assert run_id.startswith("red-") and first == {
        "wandb": {"id": run_id, "name": "red", "resume": "allow", "group": "apples"},
        "trackio": {"name": run_id, "resume": "allow", "group": "apples"},
    }


def test_an_ending_is_no_mistake():
    assert not issubclass(Ending, Mistake) and len({v for k, v in vars(endings).items() if k.isupper()}) > 4
