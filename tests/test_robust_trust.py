"""What is trusted and told: no pickles, no tokens, no folders of the machine; uploads to a server of our own."""

import ast
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants

import train_diff_instruct_pp as script
from diff_instruct.export import export
from diff_instruct.mistake import Mistake
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.prompts.files import PromptSource
from diff_instruct.prompts.survey import load_prompts
from diff_instruct.training import record, set_up
from diff_instruct.training.endings import run_to_the_end
from tests.runs import load, run


ROOT = Path(__file__).resolve().parents[1]
CODE = [*ROOT.glob("*.py"), *(ROOT / "diff_instruct").rglob("*.py"), *(ROOT / "pocket").rglob("*.py")]
TOKENS = ("hf_secretgiven", "hf_secretofenvironment")


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the Hub that an upload uses; files that come are kept in `server.files`.

    `server.fail`: how many commits are to fail first; `server.log`: (path, token) of what was asked.
    """

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, server, path = self.body(), self.server, self.path.partition("?")[0]
        server.log.append((path, self.headers.get("Authorization")))
        if path == "/api/repos/create":
            self.answer(200, {"url": f"{server.url}/me/apples", "name": "me/apples", "id": "1"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer(200, {"files": modes})
        elif path.endswith("/commit/main") and server.fail:
            server.fail -= 1
            self.answer(503, {"error": "tired"})
        elif path.endswith("/commit/main"):
            for line in body.splitlines():
                line = json.loads(line)
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{server.url}/me/apples/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            self.answer(200, {"success": True, **commit})
        else:
            self.answer(404, {"error": "unknown"})

    def do_GET(self):
        self.server.log.append((self.path, self.headers.get("Authorization")))
        self.answer(404, {"error": "unknown"})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.fail, server.log = f"http://127.0.0.1:{server.server_port}", {}, 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def here(hub, monkeypatch):
    """This process's Hub is that server."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    return hub


def small(tiny_args, *options):
    few = ["--max_train_steps", 1, "--num_eval_prompts", 1, "--validation_steps", 0, "--checkpointing_steps", 1]
    return [*tiny_args, *few, *options]


def one_core():
    """Of the child: tiny networks on busy machines wait long for a second thread."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_a_run_that_uploads_tells_no_token_and_no_folder(tiny_args, hub, tmp_path):
    """The real script against a server that refuses the first commit: exactly the export arrives; the token goes to
    the server, and is in no file and no line, and neither is the one of the environment."""
    hub.fail, out = 1, tmp_path / "out"
    options = ["--push_to_hub", "--hub_model_id", "me/apples", "--lora_rank", 2, "--hub_token", TOKENS[0]]
    command = [sys.executable, ROOT / "train_diff_instruct_pp.py", *small(tiny_args, *options)]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": TOKENS[1], "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    command = [str(word) for word in command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=one_core)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "next attempt in 2 s" in done.stdout and done.stdout.count("The upload failed") == 1
    assert {token for path, token in hub.log if "commit" in path} == {f"Bearer {TOKENS[0]}"}
    top = {name.split("/")[0] for name in hub.files}
    assert {"model_index.json", "README.md", "training_summary.json", "pipeline_one_step.py", "transformer"} <= top
    assert not any(word in name for name in hub.files for word in ("checkpoint", "logs", "history", "before"))
    for name, data in hub.files.items():
        assert not name.endswith((".bin", ".pt", ".pkl", ".ckpt", ".pickle")), name
        assert str(tmp_path.parent).encode() not in data and str(Path.home()).encode() not in data, name
    for file in (f for f in out.rglob("*") if f.is_file()):
        assert not any(token.encode() in file.read_bytes() for token in TOKENS), file
    assert not any(token in done.stdout + done.stderr for token in TOKENS)


def test_an_upload_that_fails_for_good_leaves_the_command(tiny_args, here, tmp_path, monkeypatch, capsys):
    here.fail = 99
    monkeypatch.setattr(export, "WAITS", (0, 0))
    run(small(tiny_args, "--push_to_hub", "--hub_model_id", "me/apples", "--hub_token", TOKENS[0]))
    out = capsys.readouterr().out
    assert here.fail == 96 and not here.files  # three attempts
    assert "The export is whole; upload it with\n    hf upload me/apples" in out and TOKENS[0] not in out
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_no_server_at_all_is_a_mistake_before_anything_loads(tiny_args, here, monkeypatch, capsys):
    here.shutdown()
    here.server_close()
    monkeypatch.setattr(set_up, "load_actors", None)
    with pytest.raises(Mistake, match="--push_to_hub: me/apples cannot be created on the Hub"):
        run(small(tiny_args, "--push_to_hub", "--hub_model_id", "me/apples", "--hub_token", TOKENS[0]))


def test_a_failing_run_tells_no_token(tiny_args, here, monkeypatch, capsys):
    """Neither in the traceback of a bug nor in the line of an ending."""
    import traceback

    from diff_instruct.training.arguments import parse_args

    monkeypatch.setenv("HF_TOKEN", TOKENS[1])
    arguments = small(tiny_args, "--push_to_hub", "--hub_model_id", "me/apples", "--hub_token", TOKENS[0])

    def bug(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Denoiser, "loss", bug)
    try:
        run_to_the_end(lambda: parse_args([str(a) for a in arguments]), script.main)
    except RuntimeError:
        text = traceback.format_exc()
    seen = "".join(capsys.readouterr())
    assert "a bug" in text and not any(token in text + seen for token in TOKENS)


def calls(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


@pytest.mark.parametrize("file", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(file):
    """torch.load only with weights_only=True; no pickle, eval or exec; a reward that is named is run."""
    tree = ast.parse(file.read_text())
    for call in calls(tree, "torch.load"):
        assert any(k.arg == "weights_only" and k.value.value is True for k in call.keywords), ast.unparse(call)
    for name in ("pickle.load", "pickle.loads", "eval", "exec", "numpy.load", "joblib.load", "yaml.load", "os.system"):
        assert not list(calls(tree, name)), name
    runs = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "exec_module"]
    assert not runs or file.name == "function.py"


def test_a_file_of_prompts_runs_no_code(tmp_path):
    """A pickle by the name of a table is refused or read as text; nothing in it is called."""
    import pickle

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    for suffix in (".txt", ".csv", ".jsonl", ".json", ".parquet"):
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(pickle.dumps([Evil()]))
        try:
            prompts = load_prompts(PromptSource(str(file)), None, 1)
            next(iter(prompts.train), None)
        except Mistake:
            pass
        assert not (tmp_path / "touched").exists()


def test_the_single_file_needs_torch_diffusers_and_transformers_alone():
    tree = ast.parse((ROOT / "pipeline_one_step.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "diffusers", "transformers"}


def test_the_summary_says_what_made_the_run(tiny_args, tmp_path):
    import hashlib
    from importlib.metadata import version

    run(small(tiny_args, "--seed", 3))
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    prompts = hashlib.sha256((tmp_path / "prompts.txt").read_bytes()).hexdigest()
    assert summary["prompts"] == {k: f"sha256:{prompts}" for k in ("train_prompts", "eval_prompts")}
    assert summary["seed"] == 3 and summary["device"] == "cpu" and summary["processes"] == 1
    assert summary["versions"]["torch"] == version("torch") and summary["versions"]["diffusers"] == version(
        "diffusers"
    )
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (summary["git_commit"] or "").removesuffix("-dirty") == head
    assert summary["arguments"]["output_dir"] == "out" and summary["arguments"]["mixed_precision"] == "no"


@pytest.mark.parametrize(
    "word, expected",
    [
        ("/data/prompts.txt", "prompts.txt"),
        ("user/model", "user/model"),
        ("a red apple", "a red apple"),
        ("hpsv2=/weights/hps.pt", "hpsv2=hps.pt"),
        ("--output_dir=/runs/one", "--output_dir=one"),
        ("/home/me/own.py:score:0.5", "own.py:score:0.5"),
        ("image_reward:0.5", "image_reward:0.5"),
    ],
)
def test_folders_of_the_machine_are_left_out(word, expected):
    assert record.portable(word) == expected


def test_a_dataset_is_recorded_by_its_commit(tiny_args, monkeypatch):
    args, *_ = load(tiny_args)
    args.dataset_name, args.train_prompts = "user/prompts", None
    monkeypatch.setattr(record, "dataset_info", lambda name, timeout: type("Info", (), {"sha": "abc"}))
    assert record.prompts_of(args)["dataset_name"] == "abc"

    def offline(*args, **options):
        raise ConnectionError

    monkeypatch.setattr(record, "dataset_info", offline)
    assert record.prompts_of(args)["dataset_name"] is None
