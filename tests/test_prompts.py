"""Prompts of every format, held-out splits, exact continuation, shares of processes."""

import json
from itertools import islice

import pytest
import torch
from datasets import Dataset

from diff_instruct.prompts.files import load_prompts, open_prompts
from diff_instruct.prompts.stream import PromptStream, Sampler
from tests.tiny import PROMPTS


def write(folder, kind):
    """The tiny prompts in one format; returns (path, column)."""
    path = folder / f"prompts.{kind}"
    rows = [{"id": i, "Prompt": p} for i, p in enumerate(PROMPTS)]
    if kind == "txt":
        path.write_text("\n".join(PROMPTS) + "\n")
        return path, None
    if kind in ("csv", "tsv"):
        sep = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join([f"id{sep}Prompt", *(f"{r['id']}{sep}{r['Prompt']}" for r in rows)]) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path, "Prompt"


def texts(dataset):
    return [row["text"] for row in dataset]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_formats(tmp_path, kind):
    path, column = write(tmp_path, kind)
    assert texts(open_prompts(str(path), column=column, local=True)) == PROMPTS
    assert texts(open_prompts(str(tmp_path), column=column, local=True)) == PROMPTS  # the folder


def test_quotation_marks_and_null_are_text(tmp_path):
    """As in PartiPrompts.tsv, where a prompt begins with a quotation mark; and "null" may be a prompt."""
    rows = ['"A B C" painted on a wall', 'it\'s a "sign"', "null", "NA", "a, b"]
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(["Prompt\tCategory", *(f"{row}\tx" for row in rows)]) + "\n")
    assert texts(open_prompts(str(path), column="Prompt", local=True)) == rows


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("none.txt", None, None, "no such file or folder"),
        ("empty.txt", "", None, "is empty"),
        ("head.csv", "id,Prompt\n", "Prompt", "is empty"),
        ("a.csv", "id,Prompt\n1,apple\n", None, "set --caption_column to one of: id, Prompt"),
        ("a.csv", "id,Prompt\n1,apple\n", "caption", "no column `caption`"),
        ("a.xls", "?", None, "must hold files of one of"),
    ],
)
def test_mistakes_are_named(tmp_path, name, content, column, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_prompts(str(tmp_path / name), column=column, local=True)


def numbered(tmp_path, n=100):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(n)))
    return open_prompts(str(path), local=True)


def test_stream_is_shuffled_anew_in_each_epoch_and_complete(tmp_path):
    stream = PromptStream(numbered(tmp_path), seed=0, buffer_size=50)
    epochs = [[next(stream) for _ in range(100)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts(numbered(tmp_path)))
    assert epochs[0] != epochs[1] and epochs[0] != texts(numbered(tmp_path))


@pytest.mark.parametrize("share", [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("taken", [7, 100, 130])
def test_stream_continues_exactly(tmp_path, taken, share):
    stream = PromptStream(numbered(tmp_path), 3, 20, *share)
    for _ in range(taken):
        next(stream)
    again = PromptStream(numbered(tmp_path), 3, 20, *share)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert list(islice(stream_of(stream), 90)) == list(islice(stream_of(again), 90))


def stream_of(stream):
    while True:
        yield next(stream)


def test_processes_share_an_epoch(tmp_path):
    shares = [PromptStream(numbered(tmp_path), 0, 50, rank, 2) for rank in range(2)]
    seen = [next(s) for s in shares for _ in range(50)]
    assert len(set(seen)) == 100


def test_two_processes_draw_what_one_draws(tmp_path):
    """Batch b on two ranks: the same prompts with the same noise as batch 2b on one."""

    def draws(rank, world, batch):
        sampler = Sampler(PromptStream(numbered(tmp_path), 0, 50, rank, world), (1, 2, 2), batch, 5, rank, world)
        prompts, z, eps, u, *_ = sampler()
        return {p: (z[i], eps[i], u[i]) for i, p in enumerate(prompts)}

    one, two = draws(0, 1, 8), {**draws(0, 2, 4), **draws(1, 2, 4)}
    assert one.keys() == two.keys()
    for prompt in one:
        for a, b in zip(one[prompt], two[prompt]):
            assert torch.equal(a, b)


def test_heldout_prompts_are_not_trained_on(tmp_path):
    class Args:
        train_prompts, dataset_name, caption_column, cache_dir = str(tmp_path / "numbers.txt"), None, None, None
        max_train_samples, eval_prompts, num_eval_prompts = None, None, 3

    numbered(tmp_path)
    train, heldout = load_prompts(Args)
    assert heldout == ["prompt 0", "prompt 20", "prompt 40"]
    assert len(texts(train)) == 97 and not set(heldout) & set(texts(train))
