"""A reward that fails in the middle of a run, of any kind and in any place: nothing is lost, and the run goes on."""

import os

import pytest
import torch

from diff_instruct.evaluation.judge import judge_images
from diff_instruct.rewards.asking import asking, on_all
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.numbers import NoScores
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.training.endings import Ending
from tests.processes import Run
from tests.runs import checkpoints, history, run, same, trained, weights
from tests.test_fsdp import ROOT, as_on_gpus, launched


FUNCTIONS = """
import os
import sys

import torch

calls = []

class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError("in the backward pass")

def due(pixels):
    if pixels.requires_grad and pixels.shape[-1] == 16 and "FAILS_AT" in os.environ:
        calls.append(1)
        return len(calls) == int(os.environ["FAILS_AT"])

def bright(pixels, prompts):
    if due(pixels):
        raise KeyError("no such picture")
    return pixels.mean(dim=(1, 2, 3))

def exits(pixels, prompts):
    if due(pixels):
        sys.exit("\\nout of credit\\nand more")
    return pixels.mean(dim=(1, 2, 3))

def deep(pixels, prompts):
    return (Breaks.apply(pixels) if due(pixels) else pixels).mean(dim=(1, 2, 3))
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path / "mine.py"


def fails_and_goes_on(command, tmp_path, monkeypatch, at, line, step):
    """The run fails at that call of its reward, after so many whole steps, and in the same step again when it goes on;
    then it ends as one that never failed."""
    command = [*command, "--max_train_steps", 3, "--checkpointing_steps", 0]
    run([*command, "--output_dir", tmp_path / "whole"])
    for call in (at, 1):
        monkeypatch.setenv("FAILS_AT", str(call))
        with pytest.raises(Ending, match=f"{line} after step {step}; .*checkpoint-{step} is written: go on") as end:
            run([*command, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"])
        assert end.value.code == 75 and "\n" not in str(end.value)
        assert checkpoints(tmp_path / "parts") == [f"checkpoint-{step}"]
    monkeypatch.delenv("FAILS_AT")
    run([*command, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


@pytest.mark.parametrize(
    "options, at, step",
    [
        ([], 1, 0),
        (["--reward_mode", "diffused", "--gradient_accumulation_steps", 2, "--ta_steps", 2], 4, 1),
        (["--reuse_generated", "--ta_steps", 2, "--gradient_accumulation_steps", 2], 3, 1),
        (["--reward_batch_size", 1, "--pretrain_steps", 1, "--ta_warmup_steps", 1], 2, 1),
    ],
)
def test_a_gradient_that_fails_in_the_generators_step(quick_args, functions, tmp_path, monkeypatch, options, at, step):
    """After the TA's steps, which are not taken again."""
    command = [*quick_args, *options, "--reward", "pocket", f"{functions}:bright:2"]
    line = r"reward `.*mine.py:bright` failed: KeyError: 'no such picture' \(line 25 of mine.py\)"
    fails_and_goes_on(command, tmp_path, monkeypatch, at, line, step)


def test_a_backward_pass_that_fails_while_a_ratio_is_measured(quick_args, functions, tmp_path, monkeypatch):
    command = [*quick_args, "--reward", f"{functions}:deep", "--reward_ratio", 2, "--reward_ratio_steps", 2]
    line = "the reward's gradient failed: ZeroDivisionError: in the backward pass"
    fails_and_goes_on(command, tmp_path, monkeypatch, 2, line, 1)


def test_a_function_that_exits_fails_as_others_do(quick_args, functions, tmp_path, monkeypatch):
    command = [*quick_args, "--reward", f"{functions}:exits"]
    line = r"reward `.*mine.py:exits` failed: SystemExit: out of credit \(line 30 of mine.py\)"
    fails_and_goes_on(command, tmp_path, monkeypatch, 2, line, 1)


def test_of_a_step_that_fails_what_the_ta_has_learnt_is_kept(quick_args, functions, tmp_path, monkeypatch):
    command = [*quick_args, "--reward", f"{functions}:bright", "--max_train_steps", 2, "--checkpointing_steps", 1]
    run([*command, "--output_dir", tmp_path / "whole"])
    monkeypatch.setenv("FAILS_AT", "2")
    with pytest.raises(Ending):
        run([*command, "--output_dir", tmp_path / "parts"])
    for name, step in (("generator", 1), ("teaching_assistant", 2)):
        assert same(trained(tmp_path / "whole", step, name), trained(tmp_path / "parts", 1, name))


@pytest.mark.parametrize("at, step", [(2, 1), (4, 2)])
def test_a_published_reward_that_fails_while_it_judges(quick_args, tmp_path, monkeypatch, at, step):
    """In the first validation, and after the last step."""
    command = [*quick_args, "--max_train_steps", 2, "--validation_steps", 1]
    run([*command, "--output_dir", tmp_path / "whole"])
    forward, calls = PocketReward.forward, []

    def fails(self, pixels, prompts):
        calls.append(self.name)
        if calls.count("pocket_heldout") == at:
            raise RuntimeError("no kernel image\nand more")
        return forward(self, pixels, prompts)

    with monkeypatch.context() as m:
        m.setattr(PocketReward, "forward", fails)
        with pytest.raises(Ending, match=f"reward `pocket_heldout` failed: .*no kernel image after step {step};"):
            run([*command, "--output_dir", tmp_path / "parts"])
    run([*command, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_memory_that_is_used_up_is_no_judge_that_fails(error):
    with pytest.raises(type(error)) as raised, asking("reward `x`"):
        raise error
    assert raised.value is error


def test_all_processes_end_when_one_has_no_scores():
    """One waits for the others, and what it says is its own reason, or that it was another."""

    class Two:
        num_processes, device = 2, "cpu"

        def __init__(self, others):
            self.others = others

        def reduce(self, value, how):
            return value + self.others

    for others, fails, line in ((1, False, "another process"), (0, True, "mine"), (1, True, "mine")):
        with pytest.raises(NoScores, match=line), on_all(Two(others)):
            if fails:
                raise NoScores("mine")
    with on_all(Two(0)):
        pass


def test_features_that_fail_while_judging():
    class Broken(PocketReward):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def forward(self, pixels, prompts):
            return pixels.mean(dim=(1, 2, 3))

        def image_features(self, pixels):
            raise RuntimeError("no features")

    with pytest.raises(NoScores, match="what diversity is measured by, `x`, failed: RuntimeError: no features"):
        judge_images(torch.rand(2, 3, 16, 16), ["a", "a"], Mix({}, {}), {"x": Broken()})


@pytest.mark.slow
@pytest.mark.parametrize("mode, sharded", [("clean", False), ("diffused", False), ("diffused", True)])
def test_two_processes_end_together_and_go_on(quick_args, functions, tmp_path, mode, sharded):
    """The reward fails on the second alone, in its second step: before a backward pass that both take."""
    command = [*quick_args, "--reward", f"{functions}:bright", "--reward_mode", mode, "--max_train_steps", 2]
    command = [*command, "--checkpointing_steps", 0, "--mixed_precision", "no"]
    again = [*command, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    environment = launched("--config_file", str(ROOT / "recipes" / "4gpu_fsdp2.yaml")) if sharded else {}
    log, together = tmp_path / "log.txt", {"processes": 2, "before": as_on_gpus if sharded else dict}
    together["environment"] = environment
    assert Run([*command, "--output_dir", tmp_path / "whole"], tmp_path / "whole.txt", **together).wait() == [0, 0]
    fails = second_fails_sharded if sharded else second_fails
    assert Run(again, log, **{**together, "before": fails}).wait() == [75, 75]
    assert "failed: KeyError: 'no such picture'" in log.read_text()
    assert "another process got no scores" in log.read_text()
    assert checkpoints(tmp_path / "parts") == ["checkpoint-1"]
    assert Run(again, log, **together).wait() == [0, 0]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def second_fails():
    if os.environ["RANK"] == "1":
        os.environ["FAILS_AT"] = "2"


def second_fails_sharded():
    as_on_gpus()
    second_fails()
