"""The page: what its functions draw, the Space that is written, and, opted in, a real browser."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline

import demo
from diff_instruct.export import page
from diff_instruct.export.gallery import gallery
from diff_instruct.export.original import original_layout
from diff_instruct.export.rounded import write_gguf
from diff_instruct.mistake import Mistake
from diff_instruct.rewards import catalogue
from diff_instruct.rewards import loading as rewards
from diff_instruct.rewards.specs import RewardSpec
from pipeline_one_step import OneStepPipeline
from tests.families import BUILD, FAMILY, SIDES, save


REPOSITORY = Path(demo.__file__).resolve().parent


@pytest.fixture
def export(tiny_model, tmp_path):
    """Folder of an exported OneStepPipeline."""
    stock = PixArtAlphaPipeline.from_pretrained(tiny_model)
    parts = {**dict.fromkeys(OneStepPipeline._optional_components), **stock.components}
    parts["scheduler"] = DDPMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    OneStepPipeline(**parts, family="PixArtAlphaPipeline", timestep=400).save_pretrained(tmp_path / "apples")
    return tmp_path / "apples"


@pytest.fixture(autouse=True)
def tiny_scorers(tiny_pocket, monkeypatch):
    monkeypatch.setattr(catalogue, "POCKET", tiny_pocket)


@pytest.fixture
def with_gradio(monkeypatch):
    """For what is checked before the page: whether gradio is installed does not matter."""
    monkeypatch.setattr(demo, "find_spec", lambda name: True)


def arguments(*words):
    return demo.build_parser().parse_args([str(word) for word in words])


def parts(args):
    """(model, content) of a command."""
    scorers = demo.check_args(args)
    model = demo.load_model("one step", args.model, args, torch.device("cpu"))
    return model, demo.content_of(args, scorers, torch.device("cpu"))


def test_a_prompt_and_a_seed_give_the_export_s_picture(export, with_gradio):
    model, content = parts(arguments(export))
    pixels, ms = page.pictures(model, "a red apple", [3])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    torch.testing.assert_close(pixels, pipe("a red apple", latents=z, output_type="pt").images, atol=1e-5, rtol=0)
    assert ms > 0 and content.score is None and content.before is None
    image, line = page.one(model, None, "a red apple", 3)
    assert image.size == (400, 400) and re.fullmatch(r"\d+ ms", line)


def test_nine_seeds_and_their_scores(export, with_gradio):
    """Nine pictures, each with the scores that the scorers give them; the first is that of one seed."""
    model, content = parts(arguments(export, "--reward", "pocket", "--heldout_reward", "pocket_heldout"))
    images, line = page.nine(model, content.score, "blue cat", 5)
    assert len(images) == 9 and "seeds 5 to 13" in line and line.endswith("pocket · pocket_heldout (held out)")
    pixels, _ = page.pictures(model, "blue cat", range(5, 14))
    for name, column in (("pocket", 0), ("pocket_heldout", 1)):
        scores = rewards.load_reward(RewardSpec(name), trained=False)(pixels, ["blue cat"] * 9)
        assert [caption.split(" · ")[column] for _, caption in images] == [f"{s:.2f}" for s in scores.tolist()]
    single, _ = page.pictures(model, "blue cat", [5])
    torch.testing.assert_close(pixels[:1], single, atol=1e-5, rtol=0)
    assert (pixels[0] - pixels[1]).abs().max() > 1e-3


def test_before_and_after_start_from_the_same_noise(export, tiny_model, with_gradio):
    seen = {}
    args = arguments(export, "--before", f"{tiny_model},timestep=300", "--reward", "pocket")
    model, content = parts(args)
    for side in (model, content.before):
        side.draw = lambda prompt, z, g, draw=side.draw, side=side: (seen.update({side.name: z}), draw(prompt, z, g))[
            1
        ]
    (left, right), line = page.pair(content.before, model, content.score, "fire", 2)
    torch.testing.assert_close(seen["before"], seen["one step"])
    assert left.size == right.size and left.tobytes() != right.tobytes()
    assert re.fullmatch(r"\*\*before\*\* pocket -?[\d.]+ · \d+ ms &emsp; \*\*one step\*\* pocket .*", line)


def test_only_the_open_tab_is_drawn(export, with_gradio):
    model, content = parts(arguments(export, "--before", export))
    filled = {tab: [v is not None for v in page.redraw(model, content, tab, "fire", 0)] for tab in page.TABS}
    assert filled == {tab: [i // 2 == k for i in range(6)] for k, tab in enumerate(page.TABS)}


def test_gallery_of_an_evaluation_and_of_a_run(tmp_path):
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    for folder, files in ((run, ["samples.png"]), (evaluation, ["evaluation.png", "images/mine/00012-0.png"])):
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            page.to_pil(torch.rand(1, 3, 8, 8))[0].save(folder / file)
    figures = {f"reward_{c}": 1.0 for c in ("before", "after", "gain")}
    figures |= {f"reward_{c}_ci95": [0.5, 1.5] for c in ("before", "after", "gain")}
    summary = {**figures, "reward_scale": 10.0, "arguments": {"reward": "pocket"}}
    (run / "training_summary.json").write_text(json.dumps(summary))
    items, table = gallery(run)
    assert [caption for _, caption in items] == ["samples"] and "| pocket (trained) | 1.000 [0.500, 1.500]" in table
    models = {"mine": {"figures": {"pocket": {"mean": 0.25}, "diversity": {"mean": 0.5}}}}
    (evaluation / "evaluation.json").write_text(json.dumps({"models": models}))
    items, table = gallery(evaluation / "evaluation.json")
    assert [caption for _, caption in items] == ["all models, the same noise", "mine, prompt 12"]
    assert table.splitlines()[-1] == "| mine | 0.250 | 0.500 |"
    with pytest.raises(Mistake, match="neither an evaluation.json nor"):
        gallery(tmp_path)


def test_a_space_draws_without_this_repository(export, tmp_path):
    """The app alone, in a process that knows nothing of the repository: its picture is the export's."""
    space = tmp_path / "space"
    demo.main(arguments(export, "--export_space", space, "--title", "Apples: red", "--examples", "fire", "cat"))
    front = (space / "README.md").read_text().split("---")[1]
    for line in ('title: "Apples: red"', "sdk: gradio", "app_file: app.py", "suggested_hardware: cpu-basic"):
        assert line in front.splitlines()
    code = (
        "import app, page, sys, torch; pixels, _ = page.pictures(app.model, 'fire', [1])\n"
        "torch.save(pixels, sys.argv[1])\n"
        "assert app.content.examples == ['fire', 'cat']\n"
        "assert not any(m.split('.')[0] == 'diff_instruct' for m in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(space), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", code, str(tmp_path / "pixels.pt")]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    z, _ = page.noise((4, 8, 8), [1])
    expected = pipe("fire", latents=z, output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "pixels.pt"), expected, atol=1e-5, rtol=0)


def one_of(name, folder):
    """Folder of the export of a tiny pipeline."""
    stock = FAMILY[name].stock().from_pretrained(save(name, folder / "stock"), **dict.fromkeys(FAMILY[name].unused))
    pipe = OneStepPipeline.from_pipe(stock, sizes=[[SIDES[name], SIDES[name]]])
    pipe.save_pretrained(folder / "apples")
    return folder / "apples"


def run_space(space):
    """What the app of a Space defines, run in this process beside its own page."""
    where = importlib.util.spec_from_file_location("page", space / "page.py")
    own = importlib.util.module_from_spec(where)
    sys.modules["page"] = own
    try:
        where.loader.exec_module(own)
        scope = {"__name__": "app"}
        exec((space / "app.py").read_text(), scope)
    finally:
        del sys.modules["page"]
        torch.set_grad_enabled(True)
    return scope


FAST = ("FluxPipeline", "StableDiffusionPipeline", "QwenImage21Pipeline")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BUILD])
def test_page_and_space_take_every_family(name, tmp_path, with_gradio):
    """Both draw the export's picture."""
    folder = one_of(name, tmp_path)
    pipe = OneStepPipeline.from_pretrained(folder)
    z, _ = page.noise(pipe.latent_shape(), [3])
    with torch.no_grad():  # on white, where there is transparency
        expected = pipe.decode(pipe("fire", latents=z, output_type="latent").images).clamp(0, 1)
    model, content = parts(arguments(folder))
    pixels, _ = page.pictures(model, "fire", [3])
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    demo.main(arguments(folder, "--export_space", tmp_path / "space"))
    scope = run_space(tmp_path / "space")
    pixels, _ = scope["page"].pictures(scope["model"], "fire", [3])
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_page_and_space_of_a_gguf_file(tmp_path, with_gradio):
    """The Space holds the rounded network and not the other, and draws what the page draws."""
    folder = one_of("ZImagePipeline", tmp_path)
    pipe, file = OneStepPipeline.from_pretrained(folder), tmp_path / "apples.gguf"
    write_gguf(file, original_layout(pipe.transformer, pipe.family.apps["original"]), "lumina2", "q8_0")
    model, _ = parts(arguments(folder, "--gguf", file))
    expected, _ = page.pictures(model, "fire", [3])
    z, _ = page.noise(pipe.latent_shape(), [3])
    unrounded = pipe("fire", latents=z, output_type="pt").images
    assert 1e-6 < (expected - unrounded).abs().max() < 0.1
    demo.main(arguments(folder, "--gguf", file, "--export_space", tmp_path / "space"))
    files = {p.name for p in (tmp_path / "space" / "model" / "transformer").iterdir()}
    assert files == {"config.json"} and "gguf==" in (tmp_path / "space" / "requirements.txt").read_text()
    scope = run_space(tmp_path / "space")
    pixels, _ = scope["page"].pictures(scope["model"], "fire", [3])
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_wide_pictures(export, tmp_path, with_gradio):
    model, _ = parts(arguments(export, "--resolution", "24x16"))
    pixels, _ = page.pictures(model, "fire", [0])
    assert pixels.shape == (1, 3, 16, 24)
    with pytest.raises(Mistake, match="--resolution 25x16 cannot be made"):
        parts(arguments(export, "--resolution", "25x16"))


def test_a_space_for_zero_gpu_and_of_a_model_on_the_hub(tmp_path):
    space = tmp_path / "space"
    demo.main(arguments("me/apples", "--export_space", space, "--zero_gpu"))
    app = (space / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert "@spaces.GPU(duration=15)\ndef draw(" in app and '.to("cuda")' in app and "'me/apples'" in app
    front = (space / "README.md").read_text().split("---")[1]
    assert "suggested_hardware: zero-a10g" in front and "models:\n- me/apples" in front
    assert "spaces" in (space / "requirements.txt").read_text().split() and not (space / "model").exists()


def test_a_space_never_names_what_is_no_model_on_the_hub(tmp_path):
    """Options are no part of an id: the pipeline that they describe is loaded, and written."""
    words = "me/apples,base=me/pears,timestep=400,noise=unit", "--export_space", tmp_path / "space"
    with pytest.raises(Mistake, match="no pipeline can be read from me/pears"):
        demo.main(arguments(*words))
    assert not (tmp_path / "space").exists()


def test_push_to_hub_creates_the_space(export, tmp_path, monkeypatch):
    called = {}
    made = type("Repo", (), {"repo_id": "me/apples"})
    monkeypatch.setattr(demo, "create_repo", lambda name, **options: (called.update(name=name, **options), made)[1])
    monkeypatch.setattr(demo, "upload_folder", lambda **options: called.update(uploaded=options))
    words = ["--export_space", tmp_path / "s", "--push_to_hub", "apples", "--hub_token", "hf_secret"]
    demo.main(arguments(export, *words))
    assert called["space_sdk"] == "gradio" and called["repo_type"] == called["uploaded"]["repo_type"] == "space"
    assert called["uploaded"]["folder_path"] == str(tmp_path / "s") and called["uploaded"]["repo_id"] == "me/apples"
    written = [p for p in (tmp_path / "s").rglob("*") if p.is_file()]
    assert all(b"hf_secret" not in p.read_bytes() for p in written)


@pytest.mark.parametrize(
    "words, message",
    [
        (["EXPORT", "--push_to_hub", "me/x"], "--push_to_hub needs --export_space"),
        (["EXPORT", "--reward", "beauty"], "unknown reward `beauty`"),
        (["EXPORT", "--gguf", "apples.gguf"], "--gguf apples.gguf is no file"),
        (["EXPORT", "--gallery", "EMPTY"], "neither an evaluation.json"),
        (["EMPTY"], "has no model_index.json"),
    ],
)
def test_mistakes(export, tmp_path, with_gradio, words, message):
    (tmp_path / "empty").mkdir()
    places = {"EXPORT": export, "EMPTY": tmp_path / "empty"}
    with pytest.raises(Mistake, match=message):
        demo.main(arguments(*(places.get(word, word) for word in words)))


def test_without_gradio_one_line_says_what_to_install(export, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(Mistake, match="pip install -r requirements-demo.txt"):
        demo.main(arguments(export))


@pytest.mark.browser
def test_in_a_real_browser():
    """`python demo.py` in headless Chromium: another prompt, another picture; nine seeds; before and after."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "demo.py", "--server_port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    profile, address = tempfile.mkdtemp(), f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=1)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(1)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--window-size=1100,960",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=service)
        try:
            browser.get(address)
            wait = WebDriverWait(browser, 30)

            def source():
                found = browser.find_elements(By.CSS_SELECTOR, "#picture img")
                return found and found[0].get_attribute("src")

            first = wait.until(lambda _: source())
            box = browser.find_element(By.CSS_SELECTOR, "#prompt textarea")
            box.clear()
            box.send_keys("a blue heart on a yellow background")
            wait.until(lambda _: source() and source() != first)
            time.sleep(2)  # the last letter's picture
            assert re.search(r"pocket .* ms", browser.find_element(By.ID, "figures").text)
            if os.environ.get("SCREENSHOT"):
                browser.save_screenshot(os.environ["SCREENSHOT"])
            for tab, selector, number in (("Nine seeds", "#nine img", 9), ("Before and after", "#pair img", 2)):
                for button in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]"):
                    if button.text == tab:
                        button.click()
                wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, selector)) >= number)
        finally:
            browser.quit()
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(profile, ignore_errors=True)
