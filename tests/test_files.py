"""No model is ever lost: outputs keep clear of inputs, and what is written is whole or absent, whenever one kills."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

import demo
import evaluate_one_step
import export_for_apps
from diff_instruct.export import export as export_module
from diff_instruct.files import NEW, PARTIAL, NotWritten, check_apart, whole, whole_folder
from diff_instruct.mistake import Mistake
from diff_instruct.training.arguments import parse_args
from tests.processes import Run
from tests.runs import same, weights


FOLDERS, FILES = ("model",), ("weights.safetensors", "prompts.txt", "own.py")
REFERENCE, PROMPTS = ["--pretrained_model_name_or_path", "some/model"], ["--train_prompts", __file__]


def training(output, *words):
    """What the script reads before models; a run that would be free to begin."""
    given = [*words, "--output_dir", output]
    given += [] if REFERENCE[0] in words else REFERENCE
    given += [] if PROMPTS[0] in words or "--dataset_name" in words else PROMPTS
    given += [] if "--reward" in words else ["--reward", "pocket"]
    parse_args([str(word) for word in given])


def evaluation(output, *words):
    args = [*words, "--output_dir", output]
    args += [] if "--models" in words else ["--models", "a=some/model"]
    args += [] if "--prompts" in words or "--dataset_name" in words else ["--prompts", "parti"]
    args += [] if "--rewards" in words else ["--rewards", "pocket"]
    evaluate_one_step.main(evaluate_one_step.build_parser().parse_args([str(a) for a in args]))


def space(output, *words):
    demo.check_args(demo.build_parser().parse_args([str(w) for w in (*words, "--export_space", output)]))


def apps(output, *words):
    export_for_apps.main(export_for_apps.build_parser().parse_args([str(words[0]), str(output)]))


INPUTS = [  # script, the words in which {} is the input, what the input is
    *((training, [flag, "{}"], "model") for flag in REFERENCE[:1]),
    (training, ["--pretrained_generator_name_or_path", "{}"], "model"),
    (training, ["--pretrained_generator_name_or_path", "{}"], "weights.safetensors"),
    (training, ["--pretrained_vae_model_name_or_path", "{}"], "model"),
    (training, ["--reference_lora", "{}:0.5"], "model"),
    (training, ["--reference_lora", "{}"], "weights.safetensors"),
    (training, ["--reward_decoder", "{}"], "model"),
    (training, ["--reward_checkpoint", "clip={}"], "weights.safetensors"),  # though it is not asked for
    (training, ["--reward", "{}:light:2"], "own.py"),
    (training, ["--heldout_reward", "{}:light"], "own.py"),
    (training, ["--train_prompts", "{}"], "prompts.txt"),
    (training, ["--train_prompts", "{}"], "model"),
    (training, ["--eval_prompts", "{}"], "prompts.txt"),
    (training, ["--validation_images", "{}"], "model"),
    (training, ["--dataset_name", "{}"], "model"),
    (evaluation, ["--models", "a={},steps=2,guidance=1"], "model"),
    (evaluation, ["--models", "b=x/y", "a={},base=some/model,timestep=9,noise=unit"], "weights.safetensors"),
    (evaluation, ["--models", "a=some/weights.bin,base={},timestep=9,noise=unit"], "model"),
    (evaluation, ["--prompts", "{}"], "prompts.txt"),
    (evaluation, ["--dataset_name", "{}", "--num_prompts", "2"], "model"),
    (evaluation, ["--rewards", "{}:light"], "own.py"),
    (evaluation, ["--reward_checkpoint", "pocket={}"], "model"),
    (space, ["{}"], "model"),
    (space, ["x/y", "--before", "{},timestep=9"], "model"),
    (space, ["x/y,base={}"], "model"),
    (space, ["x/y", "--gallery", "{}"], "model"),
    (space, ["x/y", "--reward", "{}:light"], "own.py"),
    (space, ["x/y", "--reward", "clip", "--reward_checkpoint", "clip={}"], "weights.safetensors"),
    (apps, ["{}"], "model"),
]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder `data` with one input of each kind, in which one is."""
    (tmp_path / "data" / "model" / "unet").mkdir(parents=True)
    (tmp_path / "data" / "model" / "model_index.json").write_text("{}")
    for name in FILES:
        (tmp_path / "data" / name).write_text("a red apple\n")
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path / "data"


def ways(folder, name):
    """(output, input as it is given, whether the output is refused) in many words for the same places."""
    real, is_folder = folder / name, (folder / name).is_dir()
    link = f"link{real.suffix}"
    (folder / link).symlink_to(real)
    (folder.parent / "above").symlink_to(folder)
    (folder.parent / "run").mkdir()
    (folder.parent / "run" / "unet").symlink_to(real)  # a link in the output leads to it
    (folder.parent / "store").mkdir()
    yield real.parent, real, True  # holds
    yield ".", name, True
    yield "..", link, True
    yield folder.parent / "above", name, True
    yield folder.parent / "run", real, True
    yield folder.parent / "runs" / "x", real, False
    yield Path("..") / f"{name}2", name, False
    if is_folder:
        yield real, real, True  # is
        yield name, f"{name}/unet/..", True
        yield link, real, True
        yield real, link, True
        yield real / "not" / "made", real, True  # lies in
        yield f"{link}/unet", name, True
        (real / "unet" / "weights").symlink_to(folder.parent / "store")  # the input's parts lie elsewhere
        yield folder.parent / "store", name, True


@pytest.mark.parametrize("script, words, name", INPUTS)
def test_no_output_is_holds_or_lies_in_an_input(inputs, monkeypatch, script, words, name):
    """Refused in one line that offers no way to do it all the same, before anything is read or written."""
    for module, loader in ((evaluate_one_step, "check"), (export_for_apps, "load_export")):
        monkeypatch.setattr(module, loader, lambda *args, **options: (_ for _ in ()).throw(InterruptedError))
    everything = lambda: sorted(inputs.parent.rglob("*"))  # noqa: E731
    for output, given, refused in ways(inputs, name):
        before = everything()
        filled = [word.replace("{}", str(given)) for word in words]
        extra = [[], ["--overwrite_output_dir"], ["--dry_run"]] if script is training else [[]]
        for more in extra:
            if refused:
                with pytest.raises(Mistake, match=" (is|holds|lies in) .* take another folder$") as error:
                    script(output, *filled, *more)
                assert "overwrite" not in str(error.value) and "\n" not in str(error.value)
            else:
                try:
                    script(output, *filled, *more)
                except InterruptedError:  # it would begin now
                    pass
        assert everything() == before


CACHES = ("--prompt_cache", "--pair_folder", "--cache_dir")


def test_caches_and_logs(inputs):
    """A cache may lie in the output, but not the output in a cache, nor a cache or the logs in a model."""
    training("run", "--prompt_cache", "run/cache", "--cache_dir", "run/hub")
    model = ["--pretrained_model_name_or_path", inputs / "model"]
    (inputs / "cache").mkdir()
    for output, words in (
        ("cache/x", ["--prompt_cache", "cache"]),
        ("cache", ["--cache_dir", "cache"]),
        *((output, [flag, "later"]) for output in ("later", "later/x") for flag in CACHES),  # though not there yet
        ("run", [*model, "--prompt_cache", "model/unet"]),
        ("run", [*model, "--logging_dir", inputs / "model"]),
        ("run", [*model, "--logging_dir", "../model/logs"]),
        ("model/checkpoint-3/x", ["--resume_from_checkpoint", "model"]),
    ):
        with pytest.raises(Mistake, match="take another folder$"):
            training(output, *words)


def test_what_no_run_has_written_is_not_written_over(inputs):
    """A model that is no input of the run, a project's own page: also if told to overwrite."""
    (inputs / "project").mkdir()
    (inputs / "project" / "README.md").write_text("mine")
    for output, name in (("model", "model_index.json"), ("project", "README.md")):
        for more in ([], ["--overwrite_output_dir"]):
            with pytest.raises(Mistake, match=f"{output} holds {name}, which no run"):
                training(output, *more)
    with pytest.raises(Mistake, match="is of no Space of ours"):
        space("project", "x/y")
    (inputs / "settings.json").write_text('{"theme": "dark"}')
    with pytest.raises(Mistake, match="no evaluation wrote"):
        evaluate_one_step.remember(inputs, {}, {})


def test_names_that_file_systems_take_for_the_same(inputs):
    """Not by their letters: what is one file or folder there is one here."""
    os.link(inputs / "prompts.txt", inputs / "other.txt")
    with pytest.raises(Mistake, match=" is "):
        check_apart([("a", inputs / "other.txt")], [("b", inputs / "prompts.txt")])


OLD = {"model_index.json": "old", "unet/index.json": "old", "unet/1.safetensors": "old", "unet/2.safetensors": "old"}
OLD |= {"README.md": "old", "lora": "old", "images/0.png": "old", "images/1.png": "old", "vae/a.bin": "old"}
NEWER = {"model_index.json": "new", "unet/1.safetensors": "new", "README.md": "new", "images/0.png": "new"}
NEWER |= {"vae/a.bin": "new"}
MINE = {"checkpoint-2/a.safetensors": "mine", "notes.txt": "mine", "unet/notes.txt": "mine"}
LEFT = {**NEWER, "images/1.png": "old", **MINE}  # which no pipeline reads


class Killed(BaseException):
    """As a kill: nobody cleans up."""


def contents(folder, names=None):
    files = {str(p.relative_to(folder)): p for p in Path(folder).rglob("*") if p.is_file()}
    return {name: p.read_text() for name, p in files.items() if names is None or name in names}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def export(folder):
    with whole_folder(folder, optional=("lora",)) as aside:
        write(aside, NEWER)


def test_an_export_takes_the_place_of_an_older_one(tmp_path):
    write(tmp_path, OLD | MINE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text").symlink_to(tmp_path / "elsewhere")
    mapped = (tmp_path / "unet" / "1.safetensors").open()
    export(tmp_path)
    assert contents(tmp_path) == LEFT and mapped.read() == "old"
    with whole_folder(tmp_path) as aside:
        write(aside, {"text/a.json": "new"})
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "text").is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, links):
    """Killed before each call that changes the folder; what is there then is whole, and the next export ends it."""
    made, calls, at = 0, [], None

    def watched(name, function):
        def call(*args, **options):
            calls.append(name)
            if at is not None and len(calls) > at:
                raise Killed
            if name == "link" and not links:
                raise OSError(1, "Operation not permitted")
            return None if name == "fsync" else function(*args, **options)

        return call

    for name in ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    seen = set()
    while True:
        folder, at = tmp_path / str(made), None
        write(folder, OLD | MINE)
        calls.clear()
        at = made
        try:
            export(folder)
            break
        except Killed:
            made += 1
        at = None
        old, new = contents(folder, OLD) == OLD, contents(folder, NEWER) == NEWER
        if not (old or new):  # then it lies whole beside, and what is here can be loaded by nobody
            assert contents(folder / NEW) == NEWER and not (folder / "model_index.json").exists()
        seen.add("old" if old else "new" if new else "aside")
        assert contents(folder, MINE) == MINE
        export(folder)
        assert contents(folder) == LEFT
    assert made > 20 and seen == {"old", "new", "aside"} and contents(folder) == LEFT


def test_an_error_of_writing_leaves_the_old_and_no_rest(tmp_path):
    write(tmp_path, OLD)
    with pytest.raises(NotWritten, match="no space left"), whole_folder(tmp_path) as aside:
        write(aside, {"unet/1.safetensors": "new"})
        raise OSError(28, "No space left on device")
    with pytest.raises(NotWritten, match="no space left"), whole(tmp_path / "README.md") as aside:
        aside.write_text("ne")
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == OLD and not (tmp_path / PARTIAL).exists()


def killed_while_writing():
    part, calls = export_module.save_part, []

    def killed(*args):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else part(*args)

    export_module.save_part = killed


def killed_while_placing():
    link, calls = os.link, []

    def killed(*args):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else link(*args)

    os.link = killed


def test_a_run_killed_while_it_writes_over_an_older_export(quick_args, tmp_path):
    """SIGKILL: the old pipeline loads after the first, the new one after the second, and the run can be ended."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = [*quick_args, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest", "--max_train_steps"]
    assert Run([*command, 1], log).wait() == [0], log.read_text()[-3000:]
    old = weights(out)
    assert Run([*command, 2], log, before=killed_while_writing).wait() == [-signal.SIGKILL]
    assert (out / PARTIAL).is_dir() and same(weights(out), old)
    DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert Run([*command, 2], log, before=killed_while_placing).wait() == [-signal.SIGKILL]
    assert not (out / "model_index.json").exists()
    new = weights(out / NEW)
    DiffusionPipeline.from_pretrained(out / NEW, trust_remote_code=True)
    assert Run([*command, 2], log).wait() == [0], log.read_text()[-3000:]
    assert same(weights(out), new) and not same(new, old) and not (out / NEW).exists() and not (out / PARTIAL).exists()
    assert json.loads((out / "training_summary.json").read_text())["steps"] == 2
    DiffusionPipeline.from_pretrained(out, trust_remote_code=True)


def test_weights_that_are_mapped_are_not_written_over(tmp_path):
    """Who reads the old file while it is replaced reads on in the old one."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    with safe_open(file, "pt") as mapped:
        with whole(file) as aside:
            save_file({"b": torch.ones(3)}, aside)
        assert mapped.get_tensor("a").abs().sum() == 0
