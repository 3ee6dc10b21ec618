"""Two processes on the CPU (gloo)."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train_diff_instruct_pp as script
from diff_instruct.training.arguments import parse_args
from tests.processes import Run
from tests.runs import from_turbo, weights
from tests.tiny import PROMPTS


ONE_BASE = ["--lora_rank", 2, "--ta_lora_rank", 2]


PAIRS = "--pair_steps 2 --num_pairs 100 --pair_sampler_steps 2 --anchor_scale 0.01 --reuse_generated".split()


def by_torchrun(arguments, log):
    """As `accelerate launch --multi_gpu` does, on the CPU: `accelerate launch --cpu` needs MPI for two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [script.__file__, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with log.open("a") as f:
        done = subprocess.run(command, env=env, stdout=f, stderr=f)
    assert done.returncode == 0, log.read_text()[-3000:]


def forked(arguments, log):
    """The same two processes, from one that has imported everything already."""
    assert Run(arguments, log, processes=2).wait() == [0, 0], log.read_text()[-3000:]


@pytest.mark.parametrize(
    "launch, options",
    [
        (by_torchrun, []),
        (forked, [*ONE_BASE, "--gradient_accumulation_steps", 2, "--gradient_checkpointing"]),
        pytest.param(forked, ["--divergence", "score", "--huber_c", 0.1], marks=pytest.mark.slow),
        (forked, ["--generator_steps", 3, "--preset", "didr"]),
        (forked, PAIRS),
        pytest.param(forked, "turbo", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_two_processes_equal_one_with_twice_the_batch(tiny_args, tmp_path, launch, options):
    """The same weights and the same evaluation; and a checkpoint of two processes is continued by two."""
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"{p} {w}" for p in PROMPTS for w in ("red", "blue", "green", "moon", "fire", "cat")))
    options = from_turbo(tiny_args, tmp_path / "turbo") if options == "turbo" else options
    common = [*tiny_args, "--train_prompts", prompts, "--max_train_steps", 3, "--adam_epsilon", 1e-3]
    common += ["--checkpointing_steps", 2, *options]
    script.main(parse_args([str(a) for a in [*common, "--train_batch_size", 4, "--output_dir", tmp_path / "one"]]))
    two = [*common, "--train_batch_size", 2, "--output_dir", tmp_path / "two"]
    launch(two, tmp_path / "log")
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], both[key], atol=1e-5, rtol=0)
    summaries = [json.loads((tmp_path / n / "training_summary.json").read_text()) for n in ("one", "two")]
    for key in ("reward_before", "reward_after", "heldout_after", "diversity_after"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], abs=1e-4)

    forked([*two, "--resume_from_checkpoint", "latest"], tmp_path / "log")
    again = weights(tmp_path / "two")
    assert all(torch.equal(both[key], again[key]) for key in both)
