"""Prompt files in every shape that people bring: each is read exactly, and what is left out is told."""

import csv
import gzip
import io
import json
import tarfile
from itertools import islice

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv

from diff_instruct.mistake import Mistake
from diff_instruct.prompts import stream as stream_module
from diff_instruct.prompts.files import PromptSource, open_prompts, usable
from diff_instruct.prompts.rows import COMMENTS, OPTIONS, problem, same, some, tidy
from diff_instruct.prompts.stream import PromptStream, TooManyFaults
from diff_instruct.prompts.survey import count_rows, load_prompts, rows_read
from diff_instruct.prompts.text_files import COMMENT, OPTION


TEXTS = ["a cute cat", 'a sign that says "no, thanks"', "two lines\nof text", "crème brûlée; with sugar", "1984"]


def texts(path, **options):
    source = PromptSource(str(path), **options)
    return [text for text, _ in usable(open_prompts(source), source)]


def write_tar(path, samples):
    """A web dataset: {name of a file: bytes} of each sample."""
    with tarfile.open(path, "w") as archive:
        for i, sample in enumerate(samples):
            for kind, content in sample.items():
                info = tarfile.TarInfo(f"shard/{i:06d}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


FRAME = pd.DataFrame({"id": range(len(TEXTS)), "prompt": TEXTS})
NAMED = {"caption_column": "prompt"}
PANDAS = {
    "comma.csv": lambda f: FRAME.to_csv(f, index=False),
    "with_index.csv": lambda f: FRAME[["prompt"]].to_csv(f),
    "semicolons.csv": lambda f: FRAME.to_csv(f, index=False, sep=";"),
    "tabs.csv": lambda f: FRAME.to_csv(f, index=False, sep="\t"),
    "a.tsv": lambda f: FRAME.to_csv(f, index=False, sep="\t"),
    "all_quoted.tsv": lambda f: FRAME.to_csv(f, index=False, sep="\t", quoting=csv.QUOTE_ALL),
    "excel.tsv": lambda f: FRAME.to_csv(f, index=False, sep="\t", encoding="utf-16", lineterminator="\r\n"),
    "spark.csv": lambda f: FRAME.to_csv(f, index=False, doublequote=False, escapechar="\\"),
    "a.csv.gz": lambda f: FRAME.to_csv(f, index=False),
    "a.jsonl.gz": lambda f: FRAME.to_json(f, orient="records", lines=True),
    **{
        f"{orient}.json": lambda f, orient=orient: FRAME.to_json(f, orient=orient)
        for orient in ("records", "columns", "index", "split", "table")
    },
    "a.parquet": lambda f: FRAME.to_parquet(f),
    "a.feather.arrow": lambda f: FRAME.to_feather(f),
}


@pytest.mark.parametrize("name", PANDAS)
def test_what_pandas_writes(tmp_path, name):
    PANDAS[name](tmp_path / name)
    assert texts(tmp_path / name, **NAMED) == TEXTS
    assert count_rows(PromptSource(str(tmp_path), **NAMED)).rows == len(TEXTS)


def test_one_column_needs_no_delimiter_in_its_header(tmp_path):
    """Programs that divide by semicolons leave commas without quotation marks; so do people."""
    rows = ["a cat, sitting", 'a "dog"', "one; two", "three"]
    pd.DataFrame({"prompt": rows}).to_csv(tmp_path / "a.csv", index=False, sep=";")
    assert texts(tmp_path / "a.csv") == rows
    (tmp_path / "b.csv").write_text('prompt\na cat, sitting\n"A B C" on a wall, at night\n')
    assert texts(tmp_path / "b.csv") == ["a cat, sitting", '"A B C" on a wall, at night']


def test_a_first_row_is_a_header_only_if_it_looks_like_one(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("5;a cute cat\n6;a dog, running\n")
    for column in (None, "caption"):
        with pytest.raises(Mistake, match="begins with the row `5 | a cute cat`.*to the number of its column, 1 to 2"):
            texts(file, caption_column=column)
    assert texts(file, caption_column="2") == ["a cute cat", "a dog, running"]
    file.write_text("a cute cat\na dog, running\n")
    assert texts(file, caption_column="1") == ["a cute cat", "a dog, running"]
    file.write_text("nr,Satz\n1,a cat\n")
    assert texts(file, caption_column="Satz") == ["a cat"]


OBJECTS = {
    "by id": ({"0012": {"category": "animals", "prompt": "a cat"}, "0013": {"prompt": "a dog"}}, "prompt"),
    "by id, plain": ({"0012": "a cat", "0013": "a dog"}, None),
    "by picture, several": ({"1.png": ["a cat"], "2.png": ["a dog"], "3.png": ["a cow", "one cow"]}, None),
    "by category": ({"animals": ["a cat", "a dog"], "food": ["a cow"]}, None),
    "by text": ({"a cat": {"category": "animals"}, "a dog": {}}, None),
    "by text, asked for": ({"cat": {"category": "animals"}, "dog": {"category": "x"}}, "key"),
    "by text, scored": ({"a cat": 5, "a dog": 3}, None),
    "by text, to files": ({"a cat": "1.png", "a dog": "2.png"}, None),
    "a list of strings": ({"version": 1, "prompts": ["a cat", "a dog"]}, None),
    "wrapped": ({"data": {"prompts": ["a cat", "a dog"]}}, None),
    "a list of rows": ({"images": [{"caption": "a cat"}, {"caption": "a dog"}]}, None),
    "COCO": (
        {
            "info": {"description": "COCO", "year": 2017},
            "licenses": [{"id": 1, "name": "CC"}],
            "images": [{"id": 7, "file_name": "7.jpg"}],
            "annotations": [{"image_id": 7, "id": i, "caption": text} for i, text in enumerate(["a cat", "a dog"])],
        },
        "caption",
    ),
    "columns": ({"prompt": ["a cat", "a dog"], "id": [1, 2]}, "prompt"),
}


@pytest.mark.parametrize("shape", OBJECTS)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_object(tmp_path, shape, indent):
    document, column = OBJECTS[shape]
    (tmp_path / "a.json").write_text(json.dumps(document, indent=indent))
    expected = ["cat", "dog"] if column == "key" else ["a cat", "a dog"]
    assert texts(tmp_path / "a.json", caption_column=column)[:2] == expected


def test_json_that_is_no_list_of_rows_is_named(tmp_path):
    for document, message in [
        ({"cat": "dog", "cow": "pig"}, "several columns; set --caption_column to one of: key, value"),
        ({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}, "its keys: train, test"),
        ({f"k{i}": [i] for i in range(800)}, "its keys: k0, .*k9 and 790 more"),
    ]:
        (tmp_path / "a.json").write_text(json.dumps(document))
        with pytest.raises(Mistake, match=message) as error:
            texts(tmp_path / "a.json")
        assert "not JSON" not in str(error.value) and len(str(error.value)) < 1000
    (tmp_path / "a.json").write_text('{"prompt":\n "a cat"}\n{"prompt":\n "a dog"}')
    assert texts(tmp_path / "a.json") == ["a cat", "a dog"]


def test_a_table_with_many_columns_is_told_in_short(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(f"text_{i}" for i in range(800)) + "\n" + ",".join("abcd" * 200) + "\n")
    for column in (None, "x"):
        with pytest.raises(Mistake, match="and 790 more") as error:
            texts(tmp_path / "a.csv", caption_column=column)
        assert "None" not in str(error.value) and len(str(error.value)) < 500
    assert some("abc") == "a, b, c"


def test_a_trainers_prompt_file(tmp_path, capsys):
    lines = ["# my prompts", "", "a cat --n low quality, bad --w 512 --h 768", "a dog -- or two", "#1 dad", "a cow"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n#ff8800 sky\n")
    assert texts(tmp_path / "a.txt") == ["a cat", "a dog -- or two", "#1 dad", "a cow", "#ff8800 sky"]
    count = load_prompts(PromptSource(str(tmp_path / "a.txt")), None, 1).count
    assert count.rows == 5 and count.skipped.counts[COMMENTS] == count.skipped.counts[OPTIONS] == 1
    line = capsys.readouterr().out
    assert "5 rows read, 5 used, 1 of them to judge with" in line and "1 comment (first a.txt:1)" in line
    assert "1 option of a trainer (first a.txt:3)" in line and line.count("\n") == 1


def test_captions_beside_pictures(tmp_path):
    for name in ("b/2", "a/1", "3", ".hidden/4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.caption").write_text(f"caption {name[-1]},\nin two lines\n")
    assert texts(tmp_path) == [f"caption {i},\nin two lines" for i in (3, 1, 2)]
    for file in list(tmp_path.rglob("*.caption")):
        file.rename(file.with_suffix(".txt"))
    assert texts(tmp_path) == [f"caption {i},\nin two lines" for i in (3, 1, 2)]
    (tmp_path / "b" / "list.txt").write_text("a\nb\n")
    count = count_rows(PromptSource(str(tmp_path)))
    assert (count.used, count.skipped.places) == (3, {"a .txt beside no picture": "b/list.txt"})


def test_folders_in_folders(tmp_path):
    for name in ("b/2", "a/1", "3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"prompt {name[-1]}\n")
    assert texts(tmp_path) == ["prompt 3", "prompt 1", "prompt 2"]
    assert count_rows(PromptSource(str(tmp_path))).files.keys() == {str(f) for f in tmp_path.rglob("*.txt")}


def test_what_datasets_saves(tmp_path):
    Dataset.from_dict({"prompt": TEXTS}).save_to_disk(tmp_path)
    assert texts(tmp_path) == TEXTS


def test_web_datasets(tmp_path):
    about = [json.dumps({"caption": f"{t}!", "width": 5}).encode() for t in TEXTS]
    write_tar(tmp_path / "0.tar", [{"jpg": b"1", "txt": t.encode(), "json": j} for t, j in zip(TEXTS, about)])
    assert texts(tmp_path / "0.tar") == texts(tmp_path) == TEXTS
    assert texts(tmp_path / "0.tar", caption_column="caption") == [f"{t}!" for t in TEXTS]
    (tmp_path / "0.tar").unlink()
    write_tar(tmp_path / "1.tar", [{"json": j, "seg.png": b"1"} for j in about])
    assert texts(tmp_path, caption_column="caption") == [f"{t}!" for t in TEXTS]
    write_tar(tmp_path / "2.tar", [{"jpg": b"1"}] * 3)
    with pytest.raises(Mistake, match="nothing of 2.tar can be used: 3 a sample without text .first 2.tar:1"):
        load_prompts(PromptSource(str(tmp_path), caption_column="caption"), None, 1)


SEVERAL = [[f"{name}, {i}" for i in range(5)] for name in ("cat", "dog", "cow", "pig")]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "hub"])
def test_several_captions_in_a_row(tmp_path, kind):
    frame = pd.DataFrame({"id": range(4), "captions": SEVERAL})
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "csv":
        frame.to_csv(folder / "a.csv", index=False)  # the cells spell Python lists
    elif kind == "jsonl":
        frame.to_json(folder / "a.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(folder / "train.parquet")
    where = {"dataset_name": str(folder)} if kind == "hub" else {"path": str(folder)}
    source = PromptSource(**where, caption_column="captions")
    assert [text for text, _ in usable(open_prompts(source), source)] == [row[0] for row in SEVERAL]
    drawn = list(islice(PromptStream(open_prompts(source), 0, 10), 400))
    assert {tuple(sorted(text[:3] for text in drawn[i : i + 4])) for i in range(0, 400, 4)} == {
        ("cat", "cow", "dog", "pig")
    }
    times = [drawn.count(text) for row in SEVERAL for text in row]
    assert min(times) > 5 and max(times) < 40  # 20 on the average
    again = PromptStream(open_prompts(source), 0, 10, 1, 2)  # the same draws, shared by two processes
    assert list(islice(again, 100)) == drawn[1:200:2]
    again.load_state_dict({"epoch": 3, "position": 2})
    assert next(again) == drawn[15]
    train, judged, _ = load_prompts(PromptSource(**where, caption_column="captions", caption_choice="first"), None, 1)
    assert judged == ["cat, 0"] and sorted(islice(PromptStream(train, 0, 10), 3)) == ["cow, 0", "dog, 0", "pig, 0"]


def test_captions_of_which_some_cannot_be_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"c": ["", null, "a cat "]}\n{"c": []}\n{"c": [""]}\n')
    source = PromptSource(str(tmp_path / "a.jsonl"))
    assert texts(source.path) == ["a cat"] and count_rows(source).skipped.counts == {
        "not text but list": 1,
        "blank": 1,
    }
    (tmp_path / "b.csv").write_text("caption\n\"['a' 'b']\"\n")  # as numpy prints them: no list that can be read
    assert texts(tmp_path / "b.csv") == ["['a' 'b']"]


def test_a_row_of_which_one_caption_is_judged_is_not_trained_on(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"c": row}) + "\n" for row in SEVERAL))
    (tmp_path / "b.txt").write_text("DOG, 3\n")
    sources = PromptSource(str(tmp_path / "a.jsonl")), PromptSource(str(tmp_path / "b.txt"))
    train, _, count = load_prompts(*sources, 4)
    assert count.judged == 1 and {text[:3] for text in islice(PromptStream(train, 0, 9), 60)} == {"cat", "cow", "pig"}


def test_a_shard_without_the_column_stops(tmp_path):
    for i in range(3):
        column = "prompt" if i != 1 else "caption"
        table = pa.table({column: [f"{i} {j}" for j in range(1000)], "id": range(1000)})
        pq.write_table(table, tmp_path / f"{i}.parquet")
    source = PromptSource(str(tmp_path), **NAMED)
    with pytest.raises(Mistake, match="nothing of 1.parquet can be used: 1,000 without `prompt` .first 1.parquet:1"):
        load_prompts(source, None, 1)
    _, _, count = load_prompts(PromptSource(str(tmp_path), **NAMED, allow_bad_rows=True), None, 1)
    assert (count.rows, count.used) == (3000, 2000)


def test_more_than_one_percent_stops(tmp_path, capsys):
    file = tmp_path / "a.csv"
    rows = [f"{i},prompt {i}\n" for i in range(199)]
    file.write_text("id,prompt\n" + "".join(rows[:50] + ["x,\n"] + rows[50:]))
    _, _, count = load_prompts(PromptSource(str(file), **NAMED), None, 4)
    line = "a.csv: 200 rows read, 199 used, 4 of them to judge with and not to train on, 1 left out: 1 blank (first "
    assert line in capsys.readouterr().out
    told = {"rows": 200, "used": 199, "judged": 4, "left_out": {"blank": 1}, "first_left_out": {"blank": "a.csv:52"}}
    assert rows_read(count, None) == {**told, "all_read": True, "cut": None}
    file.write_text("id,prompt\n" + "".join(rows) + "x,\n1,2,3\ny,\n")
    with pytest.raises(Mistake, match=r"3 of 202 rows cannot be used: 2 blank \(first a.csv:201\), 1 more cells than"):
        load_prompts(PromptSource(str(file), **NAMED), None, 4)
    assert load_prompts(PromptSource(str(file), **NAMED, allow_bad_rows=True), None, 4).count.used == 199


def test_a_quotation_that_never_ends_loses_nothing_in_silence(tmp_path):
    rows = [f'{i},"prompt, {i}"\n' for i in range(300)]
    (tmp_path / "a.csv").write_text("id,prompt\n" + "".join(rows) + '5,"a cat\n' + "6,a dog\n" * 20)
    with pytest.raises(Mistake, match="21 of 321 rows cannot be used: 21 not CSV"):
        load_prompts(PromptSource(str(tmp_path / "a.csv"), **NAMED), None, 4)


def test_a_broken_archive_is_a_mistake(tmp_path):
    rng = np.random.default_rng(0)
    whole = gzip.compress(b"\n".join(rng.bytes(30).hex().encode() for _ in range(5000)))
    (tmp_path / "a.txt.gz").write_bytes(whole[:-2000])
    with pytest.raises(Mistake, match="a.txt.gz cannot be read"):
        load_prompts(PromptSource(str(tmp_path / "a.txt.gz")), None, 4)


def test_a_streamed_data_set_is_counted_as_it_comes(tmp_path, capsys):
    """As from the Hub: the head before training, the rest in the stream, which stops by the same rule."""
    rows = [f"prompt {i}" for i in range(3000)] + [None] * 100
    pd.DataFrame({"prompt": rows}).to_parquet(tmp_path / "train.parquet")
    train, _, count = load_prompts(PromptSource(dataset_name=str(tmp_path)), None, 4)
    assert not count.whole and "1,000 rows read so far, 1,000 used, 4 of them to judge" in capsys.readouterr().out
    stream = PromptStream(train, 0, 100, allow_bad_rows=False)
    with pytest.raises(TooManyFaults, match=r"rows of prompts read so far cannot be used: .* --allow_bad_rows leaves"):
        list(islice(stream, 4000))
    stream = PromptStream(train, 0, 100)
    list(islice(stream, 4000))
    assert rows_read(count, stream) == {
        "rows": 3096, "used": 2996, "left_out": {"null": 100}, "first_left_out": {"null": "'None'"}, "all_read": True,
        "cut": None,
    }  # fmt: skip
    with pytest.raises(Mistake, match="of 1,"):
        pd.DataFrame({"prompt": rows[::-1]}).to_parquet(tmp_path / "train.parquet")
        load_prompts(PromptSource(dataset_name=str(tmp_path)), None, 4)
    assert stream_module.ENOUGH == 1000


def test_the_same_in_another_writing():
    assert same("Ａ  ＣＡＴ\n") == same("a cat") != same("a cats")
    assert same("Straße café") == same("STRASSE cafe\u0301")


# What the usual writers write comes back: any texts, in order, once.

LETTERS = st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t")
WORDS = st.sampled_from(['"', "'", ",", ";", "|", "\t", "\n", "\\", "a cat", "a", "#", "--w 512", "[", "]", "{", " "])
PROMPTS = (
    st.one_of(st.text(LETTERS, max_size=20), st.lists(WORDS, max_size=6).map("".join))
    .map(tidy)
    .filter(lambda text: problem({"text": text}) is None)
)
LISTS = st.lists(PROMPTS, min_size=1, max_size=8)


def quoted_csv(file, rows, **options):
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, **options)
        writer.writerows([["id", "prompt"], *([i, row] for i, row in enumerate(rows))])


def frame(rows, one=False):
    return pd.DataFrame({"prompt": rows} if one else {"id": range(len(rows)), "prompt": rows})


def sidecars(folder, rows):
    folder.mkdir()
    for i, row in enumerate(rows):
        (folder / f"{i:04d}.jpg").touch()
        (folder / f"{i:04d}.txt").write_text(row, encoding="utf-8", newline="")


WRITERS = {
    "a.txt": lambda f, rows: f.write_text("\n".join(rows), encoding="utf-8", newline=""),
    "csv.csv": quoted_csv,
    "csv_all.csv": lambda f, rows: quoted_csv(f, rows, quoting=csv.QUOTE_ALL),
    "csv_semicolon.csv": lambda f, rows: quoted_csv(f, rows, delimiter=";"),
    "csv_excel_tab.tsv": lambda f, rows: quoted_csv(f, rows, dialect="excel-tab"),
    "csv_all.tsv": lambda f, rows: quoted_csv(f, rows, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC),
    "pandas.csv": lambda f, rows: frame(rows).to_csv(f, index=False),
    "pandas_one.csv": lambda f, rows: frame(rows, True).to_csv(f, index=False),
    "pandas_one_semicolon.csv": lambda f, rows: frame(rows, True).to_csv(f, index=False, sep=";"),
    "pandas.tsv": lambda f, rows: frame(rows).to_csv(f, index=False, sep="\t"),
    "pandas_one.tsv": lambda f, rows: frame(rows, True).to_csv(f, index=False, sep="\t"),
    "pandas.csv.gz": lambda f, rows: frame(rows).to_csv(f, index=False),
    "pandas.json": lambda f, rows: frame(rows).to_json(f),
    "pandas.jsonl.gz": lambda f, rows: frame(rows).to_json(f, orient="records", lines=True),
    "list.json": lambda f, rows: f.write_text(json.dumps(rows)),
    "lines.jsonl": lambda f, rows: f.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8"),
    "object.json": lambda f, rows: f.write_text(json.dumps({"prompts": rows}, indent=1)),
    "by_id.json": lambda f, rows: f.write_text(json.dumps({f"{i:05d}": {"prompt": r} for i, r in enumerate(rows)})),
    "coco.json": lambda f, rows: f.write_text(json.dumps({"info": {}, "annotations": [{"caption": r} for r in rows]})),
    "arrow.csv": lambda f, rows: arrow_csv.write_csv(pa.table({"id": range(len(rows)), "prompt": rows}), f),
    "arrow.parquet": lambda f, rows: pq.write_table(pa.table({"prompt": rows}), f, row_group_size=3),
    "feather.arrow": lambda f, rows: frame(rows).to_feather(f),
    "txt.tar": lambda f, rows: write_tar(f, [{"jpg": b"", "txt": r.encode()} for r in rows]),
    "json.tar": lambda f, rows: write_tar(f, [{"json": json.dumps({"prompt": r}).encode()} for r in rows]),
    "pictures": sidecars,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(rows=LISTS)
def test_any_texts_come_back(tmp_path_factory, name, rows):
    if name == "a.txt":
        assume(all("\n" not in r and not COMMENT.match(r) and not OPTION.search(r) for r in rows))
    path = tmp_path_factory.mktemp("shape") / name
    WRITERS[name](path, rows)
    assert texts(path, caption_column="prompt", if_several=True) == rows
    count = count_rows(PromptSource(str(path), caption_column="prompt", if_several=True))
    assert (count.rows, count.used) == (len(rows), len(rows))
