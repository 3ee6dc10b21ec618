"""`--reward_standardize`: rewards without bounds in units of their spread over the generator's own pictures."""

import json

import pytest
import torch

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.catalogue import Published
from diff_instruct.rewards.mix import Mix
from diff_instruct.training import set_up, standards
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.standards import standard
from tests.parity.reward_inputs import ORACLE, random_state
from tests.parity.reward_ours import tiny_hpsv3
from tests.processes import Run
from tests.runs import history, run, same, weights


def test_what_counts_of_a_standardised_reward():
    """weight · (min(r, cap) − mean) / spread; without it the sum is as it was, to the last bit."""
    bright = lambda pixels, prompts: pixels.mean(dim=(1, 2, 3))  # noqa: E731
    mix = Mix({"a": Module(bright), "b": Module(bright)}, {"a": 2.0, "b": 0.7}, {"b": 0.5}, standardized=["b"])
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    r = bright(pixels, None)
    assert torch.equal(mix(pixels, ["c"] * 5), 2 * r + 0.7 * r.clamp(max=0.5)) and not mix.is_plain
    mix.standards = {"b": {"mean": 0.4, "spread": 0.02, "pictures": 5}}
    torch.testing.assert_close(mix(pixels, ["c"] * 5), 2 * r + 0.7 * (r.clamp(max=0.5) - 0.4) / 0.02)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.fixture
def hpsv3(quick_args, monkeypatch):
    """A command with a tiny HPSv3 of random weights as its reward, whose scores count as standardised."""
    reward = tiny_hpsv3(random_state(json.loads((ORACLE / "hpsv3_tiny" / "shapes.json").read_text())))
    monkeypatch.setattr(Published, "load", load_instead(Published.load, reward))
    words = [str(word) for word in quick_args]
    words[words.index("--reward") + 1] = "hpsv3"
    return [*words, "--reward_standardize", "hpsv3", "--reward_batch_size", 3, "--train_batch_size", 4], reward


def load_instead(load, reward):
    return lambda self, name, *args: reward if name == "hpsv3" else load(self, name, *args)


def test_a_run_with_hpsv3_standardised(hpsv3, tmp_path, monkeypatch, capsys):
    """Mean and spread are those of pictures of the first prompts, also in the checkpoint, the summary and the card; a
    resumed run measures nothing."""
    command, reward = hpsv3
    begun, seen = set_up.begin, {}

    def look(ready):
        seen.update(run=ready, sampler=ready.draws.sampler.state_dict())
        begun(ready)
        assert ready.draws.sampler.state_dict() == seen["sampler"]
        batches = [ready.draws.batch(ready.draws.sampler()) for _ in range(32)]
        x0 = [ready.actors.generator.generate(batch.z, batch.c) for batch in batches]
        pixels = ready.actors.pipe.decode(torch.cat(x0)).clamp(0, 1)
        seen["scores"] = reward(pixels, [prompt for batch in batches for prompt in batch.prompts])
        ready.draws.sampler.load_state_dict(seen["sampler"])

    with monkeypatch.context() as m:
        m.setattr(set_up, "begin", torch.no_grad()(look))
        run([*command, "--max_train_steps", 2, "--checkpointing_steps", 1, "--output_dir", tmp_path / "whole"])
    said, summary = capsys.readouterr().out, json.loads((tmp_path / "whole" / "training_summary.json").read_text())
    found = summary["reward_standards"]["hpsv3"]
    assert found["pictures"] == len(seen["scores"]) == 128
    assert found["mean"] == pytest.approx(seen["scores"].mean().item(), abs=1e-4)
    assert found["spread"] == pytest.approx(seen["scores"].std().item(), rel=1e-3)
    loop = json.loads((tmp_path / "whole" / "checkpoint-1" / "loop-0.json").read_text())
    assert loop["standards"] == {"hpsv3": found} == seen["run"].reward.standards
    words = f"Reward `hpsv3` counts as (r − {found['mean']:.4g}) / {found['spread']:.4g}: mean and spread over 128"
    assert words in said and words in (tmp_path / "whole" / "README.md").read_text()
    for row in history(tmp_path / "whole"):
        name = "val_reward" if "val_reward" in row else "reward"
        expected = (row[f"{name}_hpsv3"] - found["mean"]) / found["spread"]
        assert row[name] == pytest.approx(expected, abs=1e-3)
    assert abs(summary["reward_before"]) < 3

    monkeypatch.setattr(standards, "PICTURES", None)  # a resumed run does not look
    options = [*command, "--checkpointing_steps", 1, "--output_dir", tmp_path / "parts"]
    (tmp_path / "parts").mkdir()
    for name in ("checkpoint-1", "before.safetensors", "history.jsonl"):
        (tmp_path / "whole" / name).rename(tmp_path / "parts" / name)
    run([*options, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    again = json.loads((tmp_path / "parts" / "training_summary.json").read_text())
    assert (
        again["reward_standards"] == summary["reward_standards"] and again["reward_after"] == summary["reward_after"]
    )


def test_the_first_pictures_of_all_processes(monkeypatch):
    """Two processes score in turn what one scores, and what is over counts on none."""
    monkeypatch.setattr(standards, "PICTURES", 5)
    one, two = [[1.0, 5.0, 2.0, 8.0, 3.0, 99.0]], [[1.0, 2.0, 3.0], [5.0, 8.0, 99.0]]
    assert standard("x", one) == standard("x", two) == {"mean": 3.8, "spread": pytest.approx(7.7**0.5), "pictures": 5}


@pytest.mark.parametrize(
    "scores, line",
    [
        ([1.0, 1.0], "over 2 pictures of the generator its scores have the spread 0, which nothing can be divided by"),
        ([0.3, 0.3 + 2**-25], "over 2 pictures of the generator its scores have the spread 2.107e-08, which nothing"),
        ([1.0, float("nan"), 2.0], "1 of its 3 scores of the generator's pictures are NaN or infinite: mend the rew"),
        ([float("inf"), 1.0], "1 of its 2 scores of the generator's pictures are NaN or infinite"),
    ],
)
def test_a_spread_that_nothing_can_be_divided_by(scores, line):
    with pytest.raises(Mistake, match=f"--reward_standardize x: {line}"):
        standard("x", [scores])


def test_what_is_standardised_is_trained_on(tiny_args):
    with pytest.raises(Mistake, match="--reward_standardize: `pocket_heldout` is not in --reward; write pocket"):
        parse_args([*tiny_args, "--reward_standardize", "pocket_heldout"])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(quick_args, tmp_path):
    command = [*quick_args, "--reward_standardize", "pocket", "--max_train_steps", 1]
    run([*command, "--train_batch_size", 4, "--output_dir", tmp_path / "one"])
    two = [*command, "--train_batch_size", 2, "--output_dir", tmp_path / "two"]
    assert Run(two, tmp_path / "log.txt", 2).wait() == [0, 0]
    one, both = (
        json.loads((tmp_path / folder / "training_summary.json").read_text())["reward_standards"]["pocket"]
        for folder in ("one", "two")
    )
    assert one == pytest.approx(both, rel=1e-5)
