"""Rewards that are only numbers: a user's functions, judges elsewhere, and what both may do wrong."""

import contextlib
import json
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import urllib3
from accelerate import Accelerator

import evaluate_one_step
from diff_instruct.evaluation.judge import evaluate
from diff_instruct.mistake import Mistake
from diff_instruct.rewards.function import FunctionReward
from diff_instruct.rewards.loading import load_reward, load_scorers
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.numbers import NoScores, pictures_of, pixels_of
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.rewards.remote import RemoteReward
from diff_instruct.rewards.specs import RewardSpec, read_rewards, split_number
from diff_instruct.rewards.urls import TOKEN
from diff_instruct.training.arguments import parse_args
from examples.reward_server import serve
from tests.tiny import PROMPTS


JUDGES = """
from __future__ import annotations

import numpy as np
import torch
from PIL import Image

def a_list(pixels, prompts):
    return [float(p.mean()) for p in pixels]

def an_array(pixels, prompts):
    return pixels.detach().numpy().mean(axis=(1, 2, 3))

def counts(pixels, prompts):
    return [len(prompt) for prompt in prompts]

def of_pictures(images: list[Image.Image], prompts):
    assert all(image.mode == "RGB" for image in images)
    return [np.asarray(image).mean() / 255 for image in images]

def text(pixels, prompts):
    return ["good"] * len(prompts)

def too_few(pixels, prompts):
    return [1.0]

def uneven(pixels, prompts):
    return [[1.0], [1.0, 2.0]]

def nothing(pixels, prompts):
    pass

def fails(pixels, prompts):
    raise KeyError("no such judge\\nand a second line")

def nan(pixels, prompts):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture
def judges(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)
    return tmp_path / "judges.py"


def pictures(n=2):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def running(server):
    """The address of a server in a thread of its own, which ends with the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextlib.contextmanager
def answering(*answers):
    """A judge that gives one answer after the other, (status, body) or a function of the handler, the last for ever;
    yields (its URL, the requests that it got)."""
    got, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), json.loads(body)))
            answer = left.pop(0) if len(left) > 1 else left[0]
            if callable(answer):
                return answer(self)
            status, body = answer
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    with running(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield f"{url}/judge", got


@pytest.mark.parametrize("name", ["a_list", "an_array", "of_pictures"])
def test_numbers_of_any_kind(judges, name):
    reward = load_reward(RewardSpec(f"{judges}:{name}"), trained=False)
    r = reward(pictures(), PROMPTS[:2])
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, pictures().mean(dim=(1, 2, 3)), atol=1 / 255, rtol=0)


def test_whole_numbers(judges):
    r = load_reward(RewardSpec(f"{judges}:counts"), trained=False)(pictures(), ["a", "abc"])
    assert r.dtype == torch.float32 and r.tolist() == [1, 3]


@pytest.mark.parametrize(
    "name, message",
    [
        ("text", "returned list of something else than numbers; it must return a tensor"),
        ("too_few", r"returned shape \(1,\); it must return a tensor of shape \(2,\) or a list of 2 numbers"),
        ("uneven", ".*something else than numbers"),
        ("nothing", "returned NoneType of something else than numbers"),
        ("fails", "failed: KeyError: 'no such judge"),
        ("nan", "NaN or infinity"),
    ],
)
def test_a_function_that_gives_no_numbers(judges, name, message):
    with pytest.raises(
        Mistake, match=f"reward `.*judges.py:{name}` {'returned ' * (name == 'nan')}{message}"
    ) as error:
        load_reward(RewardSpec(f"{judges}:{name}"), trained=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a_list", "of_pictures"])
def test_numbers_where_a_gradient_is_needed_say_what_else_there_is(judges, name):
    with pytest.raises(NoScores, match="differentiable operations only.*--reward_mode surrogate"):
        load_reward(RewardSpec(f"{judges}:{name}"))


def test_pictures_and_back():
    x = (pictures() * 255).round() / 255
    torch.testing.assert_close(pixels_of(pictures_of(x)), x)
    assert pictures_of(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))[1].getpixel((0, 0)) == (255,) * 3


# A judge elsewhere.


def test_the_server_serves_any_reward(judges, tiny_pocket):
    """The same scores as here, of the pictures in 8 bits; a function beside it; prompts in any script."""
    pocket = PocketReward.from_pretrained("pocket", tiny_pocket / "scorer")
    scorers = {"pocket": pocket, "counts": FunctionReward(f"{judges}:counts")}
    with running(serve(scorers)) as url:
        x = (pictures(3) * 255).round() / 255
        remote = load_reward(RewardSpec(f"{url}/pocket"), trained=False)
        torch.testing.assert_close(remote(x, PROMPTS[:3]), pocket(x, PROMPTS[:3]).detach())
        assert RemoteReward(f"{url}/counts")(x, ["a", "яблоко", "🍎\n"]).tolist() == [1, 6, 2]
        with pytest.raises(
            NoScores, match=f"reward `{url}/other` gave no scores, but answered 404: there is no /other"
        ):
            RemoteReward(f"{url}/other")(x, PROMPTS[:3])


def test_what_is_sent_is_pictures_and_prompts(monkeypatch, capfd):
    """And the token, if there is one, which appears nowhere else."""
    with answering((200, '{"scores": [1, 2]}'), (403, "who is secret?"), (200, '{"scores": [1, 2]}')) as (url, got):
        monkeypatch.setenv(TOKEN, "secret")
        assert RemoteReward(url)(pictures(), PROMPTS[:2]).tolist() == [1, 2]
        with pytest.raises(NoScores, match="answered 403: who is ...?") as error:
            RemoteReward(url)(pictures(), PROMPTS[:2])
        monkeypatch.delenv(TOKEN)
        RemoteReward(url)(pictures(), PROMPTS[:2])
    headers, body = got[0]
    assert set(body) == {"prompts", "images"} and body["prompts"] == PROMPTS[:2] and len(body["images"]) == 2
    assert headers["Authorization"] == "Bearer secret" and "Authorization" not in got[-1][0]
    assert "secret" not in str(error.value) + "".join(capfd.readouterr())


def test_the_server_knows_its_token(judges, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    with running(serve({"counts": FunctionReward(f"{judges}:counts")})) as url:
        assert RemoteReward(f"{url}/counts")(pictures(), ["a", "b"]).tolist() == [1, 1]
        for headers in ({}, {"Authorization": "Bearer guess"}):
            answer = urllib3.request("POST", f"{url}/counts", json={"prompts": [], "images": []}, headers=headers)
            assert answer.status == 401 and answer.json() == {"error": "REWARD_TOKEN is another one, or is missing"}
        answer = urllib3.request("POST", f"{url}/counts", body=b"{", headers={"Authorization": "Bearer secret"})
        assert answer.status == 400 and answer.json()["error"].startswith("not a request for scores")


@pytest.mark.parametrize(
    "answer, message",
    [
        ((200, '{"scores": [1]}'), r"returned shape \(1,\); it must return a tensor of shape \(2,\)"),
        ((200, '{"scores": ["good", "bad"]}'), ".*something else than numbers"),
        ((200, '{"scores": [1, null]}'), ".*something else than numbers"),
        ((200, "[1, 2]"), r"gave no scores, but answered 200: \[1, 2\]"),
        ((200, "<html>\nwelcome"), "gave no scores, but answered 200: <html>"),
        ((200, ""), "gave no scores, but answered 200: nothing"),
        ((500, '{"error": "KeyError: 3"}'), "gave no scores, but answered 500: KeyError: 3"),
        ((302, ""), "gave no scores, but answered 302"),
    ],
)
def test_a_judge_that_answers_something_else(answer, message):
    with answering(answer) as (url, got), pytest.raises(NoScores, match=f"reward `{url}` {message}") as error:
        RemoteReward(url)(pictures(), PROMPTS[:2])
    assert len(got) == 1 and "\n" not in str(error.value)


def test_a_judge_that_is_busy_or_hangs_up_is_asked_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hangs_up = lambda handler: handler.connection.close()  # noqa: E731
    with answering((503, ""), hangs_up, (200, '{"scores": [1, 2]}')) as (url, got):
        assert RemoteReward(url)(pictures(), PROMPTS[:2]).tolist() == [1, 2]
    assert len(got) == 3
    with answering((503, "full")) as (url, got), pytest.raises(NoScores, match="answered 503: full"):
        RemoteReward(url, retries=2)(pictures(), PROMPTS[:2])
    assert len(got) == 3


def test_a_judge_that_is_slow_or_not_there():
    over = threading.Event()
    with answering(lambda handler: over.wait(20)) as (url, got):
        with pytest.raises(NoScores, match=f"reward `{url}` does not answer: .*timed out"):
            RemoteReward(url, timeout=0.2, retries=1)(pictures(), PROMPTS[:2])
        over.set()
    with pytest.raises(NoScores, match=f"reward `{url}` does not answer: .*refused") as error:
        RemoteReward(url, timeout=5, retries=0)(pictures(), PROMPTS[:2])
    assert "\n" not in str(error.value)


def test_what_waits_behind_a_request_without_an_answer_is_not_sent():
    """So a run that ends does not wait for each in turn; who asks after that asks anew."""
    with answering((500, "full"), (200, '{"scores": [1, 2]}')) as (url, got):
        reward = RemoteReward(url, retries=0)
        answers = [reward.ask(pictures(), PROMPTS[:2]) for _ in range(3)]
        for answer in answers:
            with pytest.raises(NoScores, match="answered 500: full"):
                answer()
        assert len(got) == 1 and reward(pictures(), PROMPTS[:2]).tolist() == [1, 2] and len(got) == 2


def test_an_ending_process_does_not_wait_for_a_judge():
    """Not after Ctrl-C, while a request has no answer and others wait behind it."""
    over = threading.Event()
    with answering(lambda handler: over.wait(20)) as (url, got):
        before, reward = threading.enumerate(), RemoteReward(url, retries=0)
        for _ in range(2):
            reward.ask(pictures(), PROMPTS[:2])
        ours = [thread for thread in threading.enumerate() if thread not in before]
        assert len(ours) == 2 and all(thread.daemon for thread in ours)
        over.set()


def test_a_judge_that_gives_nan_is_refused_before_training():
    with answering((200, '{"scores": [NaN, 1]}')) as (url, _), pytest.raises(NoScores, match="NaN or infinity"):
        load_reward(RewardSpec(url), trained=False)


# The command line.


@pytest.mark.parametrize(
    "entry, expected",
    [("http://host:8000/a/ocr", ("http://host:8000/a/ocr", None)), ("https://host/ocr:0.5", ("https://host/ocr", 0.5)),
     ("http://[::1]:80/ocr:-2", ("http://[::1]:80/ocr", -2.0))],
)  # fmt: skip
def test_entries_of_judges(entry, expected):
    assert split_number("reward", entry) == expected
    assert RewardSpec(expected[0]).label == "ocr" and RewardSpec(expected[0]).file is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--reward", "http://host/ocr"], "http://host/ocr: it only judges.*--reward_mode surrogate"),
        (["--reward", "pocket_truth"], "pocket_truth: it only judges.*--reward_mode surrogate"),
        (["--heldout_reward", "http://host:8000"], "its path is empty"),
        (["--heldout_reward", "http://host:99999/x"], "its port is no number"),
        (["--heldout_reward", "http:///x"], "it names no host"),
        (["--heldout_reward", "https://host/x?key=secret"], f"reward `https://host/x`: .*{TOKEN}"),
        (["--heldout_reward", "https://me:secret@host/x"], f"reward `https://host/x`: .*{TOKEN}"),
        (["--heldout_reward", "http://host/x", "https://other/x"], "`x` is given twice"),
        (["--reward_timeout", "0"], "must be a positive number"),
    ],
)
def test_arguments_that_cannot_work(tiny_args, options, message):
    with pytest.raises(Mistake, match=message) as error:
        parse_args([*tiny_args, *options])
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_time_and_retries_come_from_the_command_line(tiny_args):
    options = ["--heldout_reward", "http://host/ocr", "--reward_timeout", "7", "--reward_retries", "2"]
    _, (spec,) = read_rewards(parse_args([*tiny_args, *options]))
    assert (spec.timeout, spec.retries) == (7, 2)
    words = ["--models", "a=b", "--prompts", "p.txt", "--rewards", "http://host/ocr", "--reward_retries", "2"]
    args = evaluate_one_step.build_parser().parse_args(words)
    assert [spec.retries for spec in evaluate_one_step.scorers_of(args)] == [2]


def test_scorers_of_both_kinds_are_loaded(judges):
    with running(serve({"counts": FunctionReward(f"{judges}:counts")})) as url:
        scorers = load_scorers([RewardSpec(f"{url}/counts"), RewardSpec(f"{judges}:a_list")], "cpu")
        assert list(scorers) == ["counts", "a_list"]
        assert all(scorer(pictures(), PROMPTS[:2]).shape == (2,) for scorer in scorers.values())


def test_a_judge_elsewhere_looks_while_the_next_images_are_drawn():
    """One that answers no sooner than the images of the next prompt are drawn holds nothing up, and says the same."""
    drawn, last = [], len(PROMPTS) - 1

    def generate(z, c, noise):
        drawn.append(threading.Event())
        for event in drawn[:-1]:
            event.set()
        return (z.sigmoid() * 255).round() / 255

    def brightness(pixels, prompts):  # whole numbers, whatever the order of the sum
        return (255 * pixels).round().sum(dim=(1, 2, 3))

    def patient(pixels, prompts):
        k = PROMPTS.index(prompts[0])
        if k < last and not drawn[k].wait(30):
            raise TimeoutError("nothing is drawn meanwhile")
        return brightness(pixels, prompts)

    def judged(scorer):
        drawn.clear()
        generator = Namespace(generate=generate, pipe=Namespace(timesteps=[1], decode=lambda x: x))
        return evaluate(Accelerator(), generator, list, PROMPTS, 3, [(3, 8, 8)], Mix({}, {}), {"x": scorer}, 2)

    with running(serve({"patient": patient})) as url:
        here, elsewhere = judged(brightness), judged(RemoteReward(f"{url}/patient"))
    assert here.keys() == elsewhere.keys() and all(torch.equal(here[k], elsewhere[k]) for k in here)
