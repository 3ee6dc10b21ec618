"""Prompts of every format, rows that cannot be used, held-out prompts."""

import json
import logging
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.files import PromptSource, open_prompts, prompt_sources, usable
from diff_instruct.prompts.rows import BLANK_LINES, Skipped
from diff_instruct.prompts.stream import PromptStream
from diff_instruct.prompts.survey import load_prompts, prompts_to_draw
from diff_instruct.training.arguments import parse_args
from tests.tiny import PROMPTS


def write(folder, kind):
    """The tiny prompts in one format; returns their source."""
    path = folder / f"prompts.{kind}"
    rows = [{"id": i, "Prompt": p} for i, p in enumerate(PROMPTS)]
    if kind == "txt":
        path.write_text("\n".join(PROMPTS) + "\n")
    elif kind in ("csv", "tsv"):
        sep = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join([f"id{sep}Prompt", *(f"{r['id']}{sep}{r['Prompt']}" for r in rows)]) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return PromptSource(str(path), caption_column="Prompt", if_several=True)


def texts(source, skipped=None):
    return [text for text, _ in usable(open_prompts(source), source, skipped)]


def test_what_datasets_saves(tmp_path):
    """Rows once, also when the data set was mapped where it lies; not all splits as one."""
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    dataset.save_to_disk(tmp_path / "one")
    load_from_disk(tmp_path / "one").map(lambda row: {"prompt": row["prompt"].upper()})
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    assert texts(PromptSource(str(tmp_path / "one"))) == PROMPTS
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "several")
    with pytest.raises(Mistake, match="several holds the splits test, train: give the folder of one of them"):
        texts(PromptSource(str(tmp_path / "several")))
    assert texts(PromptSource(str(tmp_path / "several" / "train"))) == PROMPTS


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_formats(tmp_path, kind):
    assert texts(write(tmp_path, kind)) == PROMPTS
    assert texts(PromptSource(str(tmp_path), caption_column="Prompt", if_several=True)) == PROMPTS  # the folder


def test_json_lines_in_a_json_file_and_lists_of_strings(tmp_path):
    path = tmp_path / "a.json"
    for content in ('{"Prompt": "a"}\n{"Prompt": "b"}', '\ufeff\n ["a",\n "b"]', '"a"\n"b"\n'):
        path.write_text(content)
        assert texts(PromptSource(str(path))) == ["a", "b"]


def test_quotation_marks_and_null_are_text(tmp_path):
    """As in PartiPrompts.tsv, where a prompt begins with a quotation mark; and "null" may be a prompt."""
    rows = ['"A B C" painted on a wall', 'it\'s a "sign"', "null", "NA", "a, b", "1984"]
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(["Prompt\tCategory", *(f"{row}\tx" for row in rows)]) + "\n")
    source = PromptSource(str(path), caption_column="Prompt", category_column="Category")
    assert list(usable(open_prompts(source), source)) == [(row, "x") for row in rows]


LONG = "x" * 1_000_000
JSON_ROWS = [
    '{"p": "good"}', '{"p": null}', '{"p": 5}', '{"p": [1]}', '{"p": ""}', '{"p": " \\n"}', '{"p": "a\\u0000b"}',
    '{"p": "\\ud83d"}', '{"q": "x"}', "5", "{", "", "[" * 100_000, json.dumps({"p": LONG}), '{"p": " also good "}',
]  # fmt: skip
JSON_PROBLEMS = {
    "null": 1, "without `p`": 1, "not text but int": 2, "not text but list": 1, "blank": 2, BLANK_LINES: 1,
    "a NUL character": 1, "not UTF-8": 1, "not JSON": 2, "longer than 10,000 characters": 1,
}  # fmt: skip
BAD = [
    ("a.txt", b"\xef\xbb\xbfgood\r\n\r\n \t\r\na\0b\r\ncaf\xe9\r\nalso good\r\n" + LONG.encode() + b"\r\n",
     {BLANK_LINES: 2, "a NUL character": 1, "not UTF-8": 1, "longer than 10,000 characters": 1}),
    ("a.csv",
     b'\xef\xbb\xbfp,q\r\ngood,1\r\n,2\r\n\r\n\xff\xfe,3\r\na,b,c\r\nalso good,\r\n"' + LONG.encode() + b'",x\r\n',
     {"blank": 1, BLANK_LINES: 1, "not UTF-8": 1, "more cells than columns": 1, "longer than 10,000 characters": 1}),
    ("a.tsv", b"p\tq\ngood\t1\n\xe9\t2\na\tb\tc\nalso good\t\n", {"not UTF-8": 1, "more cells than columns": 1}),
    ("a.jsonl", "\n".join(JSON_ROWS).encode() + b'\n{"p": "caf\xe9"}', JSON_PROBLEMS | {"not UTF-8": 2}),
    ("a.json", b'[{"p": "good"}, {"p": null}, {}, 5, null, {"p": "also good"}]',
     {"null": 1, "without `p`": 1, "not text but int": 1, "not text but NoneType": 1}),
]  # fmt: skip


@pytest.mark.parametrize("name, content, problems", BAD)
def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, caplog, name, content, problems):
    (tmp_path / name).write_bytes(content)
    source, skipped = PromptSource(str(tmp_path / name), caption_column="p", if_several=True), Skipped()
    assert texts(source, skipped) == ["good", "also good"]
    assert skipped.counts == problems
    assert len(skipped.first) == min(5, sum(problems.values())) and skipped.first[0].startswith(f"{name}:")
    stream = PromptStream(open_prompts(source), 0, 10)
    drawn = list(islice(stream, 6))  # three epochs
    assert sorted(drawn[:2]) == sorted(drawn[4:]) == ["also good", "good"] and stream.skipped.counts == problems
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and skipped.first[0] in lines[0] and "\n" not in lines[0] and len(lines[0]) < 1000


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    raw = pa.array([b"good", None, b"\xff\xfe", b"", b"also good"])
    text = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    table = pa.table({"p": text, "n": [1, 2, 3, 4, 5], "picture": [b"1"] * 5})
    pq.write_table(table, tmp_path / "a.parquet")
    source, skipped = PromptSource(str(tmp_path / "a.parquet"), caption_column="p"), Skipped()
    assert texts(source, skipped) == ["good", "also good"]
    assert skipped.counts == {"null": 1, "not UTF-8": 1, "blank": 1}
    with pytest.raises(Mistake, match="holds numbers; set --caption_column to one of: p, picture"):
        texts(PromptSource(source.path, caption_column="n"))
    with pytest.raises(Mistake, match="5 not text but bytes.*--caption_column names another column"):
        texts(PromptSource(source.path, caption_column="picture"))


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("none.txt", None, None, "no such file or folder"),
        ("empty.txt", "", None, "is empty"),
        ("blank.txt", "\n" * 100_000, None, "no prompts that can be used: 100,000 blank lines; the first: blank.t"),
        ("head.csv", "id,Prompt\n", "Prompt", "is empty"),
        ("a.csv", "id,Prompt\n1,apple\n", None, "set --caption_column to one of: id, Prompt"),
        ("a.csv", "id,Prompt\n1,apple\n", "caption", "no column `caption`"),
        ("a.csv", "id,Prompt\n1,apple\n2,pear\n", "id", "column `id` holds numbers"),
        ("a.jsonl", '{"a": 1, "b": "x"}\n', "a", "column `a` holds numbers"),
        ("a.jsonl", '{"a": [1], "b": "x"}\n', "a", "1 not text but list.*--caption_column names another"),
        ("a.jsonl", "5\n6\n", None, "no rows that can be read; the first one: not text but int"),
        ("a.json", '[\n  {"a": "x"},\n', None, "no rows that can be read"),
        ("a.parquet", "PAR1", None, "cannot be read"),
        ("a.xls", "?", None, "must hold files of one of"),
        ("utf16.txt", "a cat\na dog".encode("utf-16-le").decode("latin-1"), None, "can be used"),
    ],
)
def test_mistakes_are_named(tmp_path, name, content, column, message):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    source = PromptSource(str(tmp_path / name), caption_column=column)
    with pytest.raises(Mistake, match=message) as error:
        load_prompts(source, None, 4)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_dataset_that_cannot_be_opened_is_a_mistake():
    with pytest.raises(Mistake, match="the prompts user/none cannot be downloaded .*; give a file instead"):
        open_prompts(PromptSource(dataset_name="user/none"))


def test_a_dataset_that_is_named(tmp_path):
    """As `datasets` opens one from the Hub; here a folder with two shards, and columns that are not read."""
    for i in range(2):
        rows = [{"p": f"prompt {i} {j}" if j else None, "n": j, "tokens": [j]} for j in range(50)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"train-{i}.parquet")
    named = {"dataset_name": str(tmp_path), "max_samples": 60}
    source = PromptSource(**named, caption_column="p", category_column="n")
    skipped = Skipped()
    rows = list(usable(open_prompts(source), source, skipped))
    assert len(rows) == 58 and rows[0] == ("prompt 0 1", 1) and skipped.counts == {"null": 2}
    train, heldout, _ = load_prompts(PromptSource(**named, caption_column="p", allow_bad_rows=True), None, 4)
    assert heldout == ["prompt 0 1", "prompt 0 21", "prompt 0 41"]
    assert sorted(epoch(train, 0, 55)) == sorted(text for text, _ in rows if text not in heldout)
    for column, message in [
        ("n", "60 not text but int"),
        ("tokens", "60 not text but list"),
        (None, "one of: p, n, t"),
    ]:
        with pytest.raises(Mistake, match=message):
            load_prompts(PromptSource(**named, caption_column=column), None, 4)


def test_one_column_needs_no_name(tmp_path):
    (tmp_path / "a.csv").write_text("captions\na cat\n")
    assert texts(PromptSource(str(tmp_path / "a.csv"))) == ["a cat"]
    assert texts(PromptSource(str(tmp_path / "a.csv"), caption_column="Prompt", if_several=True)) == ["a cat"]
    with pytest.raises(Mistake, match="no column `Prompt`"):
        texts(PromptSource(str(tmp_path / "a.csv"), caption_column="Prompt"))


def test_sources_are_read_from_the_arguments(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n")
    out = ["--output_dir", str(tmp_path / "out")]
    command = ["--train_prompts", str(tmp_path / "a.txt"), "--max_train_samples", "5", *out]
    train, judge = prompt_sources(parse_args(command))
    assert train == PromptSource(str(tmp_path / "a.txt"), max_samples=5) and train.finite and judge is None
    command = ["--dataset_name", "user/set", "--dataset_config_name", "c", "--dataset_split", "s"]
    command += ["--caption_column", "p", "--eval_prompts", str(tmp_path / "a.txt"), *out]
    train, judge = prompt_sources(parse_args(command))
    assert train == PromptSource(None, "user/set", "c", "s", caption_column="p") and not train.finite
    option = "--eval_caption_column"
    assert judge == PromptSource(str(tmp_path / "a.txt"), caption_column="p", if_several=True, option=option)
    _, judge = prompt_sources(parse_args([*command, option, "q"]))
    assert judge == PromptSource(str(tmp_path / "a.txt"), caption_column="q", option=option)


def epoch(dataset, seed, n):
    return list(islice(PromptStream(dataset, seed, 1000), n))


@pytest.mark.parametrize("seed", [1, 3])
def test_heldout_prompts_are_not_trained_on(tmp_path, seed):
    """24 files: the order of files is shuffled, too, so that a row's number says nothing."""
    for i in range(24):
        (tmp_path / f"{i:02d}.txt").write_text("".join(f"prompt {i} {j}\n" for j in range(200)))
    train, heldout, _ = load_prompts(PromptSource(str(tmp_path)), None, 8)
    assert heldout == [f"prompt 0 {20 * i}" for i in range(8)]
    seen = epoch(train, seed, 24 * 200 - 8)
    assert len(set(seen)) == 24 * 200 - 8 and not set(heldout) & set(seen)


def test_heldout_prompts_that_occur_again_are_not_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"prompt {i}\n" for i in range(40)))
    (tmp_path / "b.txt").write_text("A  Prompt 0 \nprompt  20\n Prompt 0\nother\n")
    train, heldout, _ = load_prompts(PromptSource(str(tmp_path)), None, 2)
    assert heldout == ["prompt 0", "prompt 20"]
    assert sorted(epoch(train, 0, 40)) == sorted(
        [*(f"prompt {i}" for i in range(40) if i % 20), "other", "A  Prompt 0"]
    )


def test_only_the_first_samples(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"prompt {i}\n" for i in range(40)))
    train, heldout, _ = load_prompts(PromptSource(str(tmp_path / "a.txt"), max_samples=5), None, 2)
    assert heldout == ["prompt 0"] and sorted(epoch(train, 0, 8)[:4]) == [f"prompt {i}" for i in range(1, 5)]


def test_nothing_left_to_train_on_is_a_mistake(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\nA cat\n\n")
    with pytest.raises(Mistake, match="every prompt is held out to judge with .1., none is left to train on"):
        load_prompts(PromptSource(str(tmp_path / "a.txt")), None, 2)


def test_prompts_to_judge_with_may_be_named(tmp_path, capsys):
    """They are not trained on, however they are written."""
    (tmp_path / "a.txt").write_text("a  cat\na dog\na ﬁsh\nCaFE\u0301\na bird\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("a Cat\n\na FISH\nCafé\na bird\n", encoding="utf-8")
    source = PromptSource(str(tmp_path / "a.txt"))
    train, judge, count = load_prompts(source, PromptSource(str(tmp_path / "b.txt")), 3)
    assert judge == ["a Cat", "a FISH", "Café"] and sorted(epoch(train, 0, 2)) == ["a bird", "a dog"]
    assert (count.rows, count.used, count.judged) == (5, 5, 3)
    line = capsys.readouterr().out
    assert "a.txt: 5 rows read, 5 used, 3 of them to judge with and not to train on, 0 left out" in line
    assert "b.txt: 4 rows read, 4 used, 0 left out; no prompts: 1 blank line (first b.txt:2)" in line


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl", "my own.txt"])
def test_prompts_to_draw_may_be_a_file(tmp_path, name):
    """Whose first prompts are drawn; what only ends as a file does is a prompt."""
    lines = [json.dumps({"prompt": text}) if name.endswith("l") else text for text in ("fire", "blue cat", "moon")]
    (tmp_path / name).write_text("\n".join(lines) + "\n")

    def drawn(*words, number=2):
        given = ["--validation_prompts", *map(str, words), "--num_validation_prompts", str(number)]
        common = ["--train_prompts", __file__, "--reward", "pocket", "--output_dir", str(tmp_path / "out")]
        return prompts_to_draw(parse_args([*common, "--pretrained_model_name_or_path", "a/b", *given]), ["judged"])

    assert drawn(tmp_path / name) == ["fire", "blue cat"]
    assert drawn("fire", "a sign that says README.txt") == ["fire", "a sign that says README.txt"]
    with pytest.raises(Mistake, match=f"give prompts or one file of them, not .*{name} among others"):
        drawn("fire", tmp_path / name)
    with pytest.raises(Mistake, match="nowhere.txt"):
        drawn(tmp_path / "nowhere.txt")
