"""From scores to figures, comparisons and tables, and the prompt sets of the benchmarks."""

import json

import pytest
import torch

import evaluate_one_step as script
from diff_instruct.evaluation import prompt_sets as benchmark
from diff_instruct.evaluation.candidates import Contender
from diff_instruct.evaluation.prompt_sets import PromptSet, load_prompt_set, spread
from diff_instruct.evaluation.report import compare_pairs, markdown, report, summarise
from diff_instruct.evaluation.statistics import mean_over_categories, mean_with_interval, wins
from diff_instruct.mistake import Mistake


def prompt_set(n, categories=None, rule="prompts"):
    return PromptSet("by hand", [f"prompt {i}" for i in range(n)], categories, rule)


def test_pairs_are_compared_image_by_image():
    """Two prompts, two images: three wins and a tie, so 3.5 of 4, and differences 3, 1, 2, 0."""
    ours, theirs = torch.tensor([[4.0, 2.0], [3.0, 0.5]]), torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    assert wins(ours, theirs).tolist() == [[1, 1], [1, 0.5]]
    scores = {"pocket": ours, "diversity": torch.tensor([0.2, 0.4])}
    baseline = {"pocket": theirs, "diversity": torch.tensor([0.3, 0.3])}
    result = compare_pairs(scores, baseline, prompt_set(2))
    assert result["pocket"]["difference"] == {
        "mean": 1.5,
        "ci95": [1.0, 2.0],
    }  # resampled means of (2, 1) are 1, 1.5, 2
    assert result["pocket"]["win_rate"] == {"mean": 0.875, "ci95": [0.75, 1.0]}
    assert (
        result["diversity"]["difference"]["mean"] == pytest.approx(0, abs=1e-7)
        and "win_rate" not in result["diversity"]
    )


def test_a_paired_difference_is_sharper_than_the_two_figures():
    """The prompts differ much, the models little: only the paired interval excludes 0."""
    rng = torch.Generator().manual_seed(0)
    prompts, noise = 10 * torch.randn(60, 1, generator=rng), torch.randn(60, 4, generator=rng)
    a, b = prompts + noise, prompts + noise + 0.5 + 0.1 * torch.randn(60, 4, generator=rng)
    low, high = compare_pairs({"r": b}, {"r": a}, prompt_set(60))["r"]["difference"]["ci95"]
    assert 0.4 < low < high < 0.6
    (_, (_, high_a)), (_, (low_b, _)) = mean_with_interval(a), mean_with_interval(b)
    assert low_b < high_a


def test_the_rule_of_hpsv2_weighs_categories_alike():
    values, categories = torch.tensor([[1.0], [1.0], [1.0], [5.0]]), ["anime", "anime", "anime", "photo"]
    assert summarise({"hpsv2": values}, prompt_set(4, categories))["hpsv2"]["mean"] == 2
    figure = summarise({"hpsv2": values}, prompt_set(4, categories, "categories"))["hpsv2"]
    assert (figure["mean"], figure["ci95"]) == (3, None)  # one photo tells nothing of how photos vary
    assert figure["by_category"]["photo"] == {"mean": 5, "ci95": None, "n_prompts": 1}
    assert figure["by_category"]["anime"] == {"mean": 1, "ci95": [1, 1], "n_prompts": 3}


def test_interval_over_categories():
    """One category is no category; and between categories nothing varies."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(50, 2, generator=rng)
    assert mean_over_categories(values, ["a"] * 50) == mean_with_interval(values)
    apart = torch.cat([values, values + 100])
    categories = ["a"] * 50 + ["b"] * 50
    mean, (low, high) = mean_over_categories(apart, categories)
    assert mean == pytest.approx(float(values.double().mean()) + 50) and high - low < 0.6
    _, (low, high) = mean_with_interval(apart)
    assert high - low > 10


def arguments(*given):
    return script.build_parser().parse_args(["--models", "a=b", *map(str, given)])


def test_the_prompt_sets_of_the_benchmarks(tmp_path, monkeypatch):
    """Their files, as the Hub has them, in small: which rows and columns are taken."""

    def download(repo, file, repo_type):
        assert repo_type == "dataset"
        return str(tmp_path / repo.replace("/", "-") / file)

    monkeypatch.setattr(benchmark.huggingface_hub, "hf_hub_download", download)
    parti = tmp_path / "nateraw-parti-prompts"
    parti.mkdir()
    (parti / "PartiPrompts.tsv").write_text('Prompt\tCategory\tNote\nbond\tAbstract\tx\n"A B" on a wall\tAnimals\ty\n')
    prompts = load_prompt_set(arguments("--prompts", "parti"))
    assert prompts.texts == ["bond", '"A B" on a wall'] and prompts.categories == ["Abstract", "Animals"]
    assert prompts.rule == "prompts"

    folder = tmp_path / "zhwang-HPDv2" / "benchmark"
    folder.mkdir(parents=True)
    for name in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{name}.json").write_text(json.dumps([f"{name} {i}" for i in range(5)]))
    prompts = load_prompt_set(arguments("--prompts", "hpsv2"))
    assert len(prompts.texts) == 20 and prompts.rule == "categories" and prompts.categories[5] == "concept-art"
    assert load_prompt_set(arguments("--prompts", "hpsv2", "--num_prompts", 4)).texts == [
        "anime 0", "concept-art 0", "paintings 0", "photo 0",
    ]  # fmt: skip

    def coco(source):
        known = source.dataset_name, source.split, source.caption_column
        assert known == ("phiyodr/coco2017", "validation", "captions")
        return [{"text": [f"caption {i}\n", "another"]} for i in range(5000)]

    monkeypatch.setattr(benchmark, "open_prompts", coco)
    prompts = load_prompt_set(arguments("--prompts", "coco2017"))
    assert len(prompts.texts) == 1000 and prompts.texts[:2] == ["caption 0", "caption 5"]


def test_categories_with_holes(tmp_path, capsys):
    """Three of four prompts have one: those are reported, the hole is told, and no mean over categories is taken."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt,kind\na cat,animal\na pear,\na dog,animal\nthe moon,sky\n")
    columns = ["--prompts", file, "--caption_column", "prompt", "--category_column", "kind"]
    prompts = load_prompt_set(arguments(*columns))
    assert prompts.categories == ["animal", None, "animal", "sky"] and prompts.rule == "prompts"
    assert prompts.rows["used"] == 4 and "1 of 4 have no category" in capsys.readouterr().out
    figures = summarise({"clip": torch.tensor([[1.0], [9.0], [3.0], [5.0]])}, prompts)["clip"]
    means = {name: figure["mean"] for name, figure in figures["by_category"].items()}
    assert figures["mean"] == 4.5 and means == {"animal": 2, "sky": 5}
    with pytest.raises(Mistake, match="1 of 4 prompts of .* have no category, the first is `a pear`.*_over prompts"):
        load_prompt_set(arguments(*columns, "--mean_over", "categories"))
    file.write_text("prompt,kind\na cat,animal\n,\n")
    with pytest.raises(Mistake, match="1 of 2 rows cannot be used: 1 blank .first rows.csv:3.*--allow_bad_rows"):
        load_prompt_set(arguments(*columns))
    assert load_prompt_set(arguments(*columns, "--allow_bad_rows")).texts == ["a cat"]


def test_the_output_says_rule_and_units():
    """Of HPSv2: 100 · cosine, and the mean over categories."""
    batch = {
        "scores": {"hpsv2.1": [[28.0], [30.0]]},
        "seconds_per_image": 1.0,
        "gib": 1.0,
        "truncated": {"hpsv2.1": [3]},
    }
    batch.update(diversity_by="hpsv2.1", latent_shape=[4, 8, 8])
    args = arguments("--prompts", "hpsv2", "--num_images", 1)
    prompts = prompt_set(2, ["anime", "photo"], "categories")
    result = report(args, {"a": Contender("a", "x")}, {"a": [batch]}, prompts, torch.device("cpu"))
    assert result["models"]["a"]["figures"]["hpsv2.1"]["mean"] == 29 and result["truncated_prompts"] == {"hpsv2.1": 1}
    text = markdown(result)
    assert "mean over the categories of their means" in text and "hpsv2.1: 100 · cosine" in text
    assert "anime (1)" in text and "in part only: hpsv2.1 1" in text


def test_even_distances():
    assert list(spread(10, 3)) == [0, 3, 6] and list(spread(3, 10)) == list(spread(3, None)) == [0, 1, 2]
