"""Prompts that the text encoders of a generator cut are counted before anything large loads."""

from bisect import bisect_left
from pathlib import Path

import pytest
import torch

from diff_instruct.models.configs import ModelSource
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import read_models
from diff_instruct.prompts.cut import Cut
from diff_instruct.prompts.files import PromptSource
from diff_instruct.prompts.survey import in_words, load_prompts
from diff_instruct.rewards.specs import RewardSpec
from tests.families import BUILD, save


def is_cut(cut, prompt):
    before = cut.cut
    cut.add(prompt)
    cut.look()
    return cut.cut > before


@pytest.mark.parametrize("name", BUILD)
def test_a_prompt_is_cut_if_more_words_change_nothing(tmp_path, name):
    """As counted with the tokenizers alone, and as the pipeline encodes it: for each family."""
    models = read_models(ModelSource(save(name, tmp_path)))
    cut = Cut.of(models)
    n = bisect_left(range(2000), True, key=lambda n: is_cut(cut, "a" + " cat" * n))
    if n == 2000:  # a tokenizer without a limit
        assert cut.longest < cut.tokens and cut.counted
        return
    assert 5 < n < 2000 and cut.longest > cut.tokens
    pipe = load_generator(models, load_reference(models, torch.float32))

    def c(words):
        with torch.no_grad():
            return pipe.encode_prompt(["a" + words])

    def same(a, b):
        return all(a[k].shape == b[k].shape and torch.allclose(a[k], b[k], atol=1e-6) for k in a)

    assert not same(c(" cat" * (n - 1)), c(" cat" * (n - 2) + " dog"))
    around = 50  # tokens of templates that are cut first
    assert same(c(" cat" * (n + around)), c(" cat" * (n + around) + " dog"))


def test_it_is_told_before_training(tmp_path, tiny_model, capsys):
    """With the place of the first one, and the rewards that read more; in the summary and in words."""
    (tmp_path / "a.txt").write_text("a cat\n" + "a dog " * 100 + "\n" + "a cow\n" * 8)
    models = read_models(ModelSource(tiny_model))
    (tmp_path / "mine.py").touch()
    rewards = [RewardSpec("clip"), RewardSpec(f"{tmp_path}/mine.py:f")]
    cut = Cut(Cut.of(models).readings, rewards)
    count = load_prompts(PromptSource(str(tmp_path / "a.txt")), None, 1, cut=cut).count
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("1 of 10 prompts (10%) are longer than the 120 tokens that the text encoder reads")
    assert "the longest has 201 (first a.txt:2): the reward f reads more, and asks for what" in line
    assert count.as_dict()["cut"] == {"counted": 10, "cut": 1, "tokens": 120, "longest": 201}
    assert in_words(count.as_dict()).endswith("; 1 of 10 are longer than the 120 tokens that are read")


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-3.5-large"])
def test_an_architecture_without_tokenizers_counts_nothing(name):
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures" / name
    models = read_models(ModelSource(str(folder)))
    cut = Cut.of(models)
    assert not is_cut(cut, "a cat " * 1000) and cut.as_dict() is None and str(cut) == ""
