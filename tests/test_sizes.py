"""Several image sizes in one run: each batch draws one; training, judging, plan and export follow."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from diff_instruct.evaluation.pictures import image_grid, picture
from diff_instruct.export.card import stock_call
from diff_instruct.mistake import Mistake
from diff_instruct.models.configs import sizes_of
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.stream import Sampler
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.checkpoints import FORMAT, check_checkpoint
from diff_instruct.training.record import arguments_of
from diff_instruct.training.steps import GeneratorStep
from evaluate_one_step import grid
from pipeline_one_step import OneStepPipeline
from tests.runs import run, same
from tests.tiny import tiny_sdxl


SHAPES = [(4, 8, 8), (4, 8, 12), (4, 12, 8)]


def draws(sampler, n):
    return [sampler() for _ in range(n)]


def test_width_stands_before_height():
    assert sizes_of([1024, "832x1216"]) == [(1024, 1024), (1216, 832)] and sizes_of(None) == []


def test_each_batch_draws_a_size_and_all_processes_the_same():
    """Two processes with batch 2 draw the sizes, and together the noise, of one with batch 4; and a resumed one."""
    one, *two = (Sampler(iter(["a"] * 999), SHAPES, 4 // n, 5, rank, n) for n, rank in ((1, 0), (2, 0), (2, 1)))
    whole, first, second = (draws(sampler, 12) for sampler in (one, *two))
    assert {draw.z.shape[1:] for draw in whole} == {torch.Size(shape) for shape in SHAPES}
    for w, a, b in zip(whole, first, second):
        assert torch.equal(w.z[0::2], a.z) and torch.equal(w.z[1::2], b.z)

    again = Sampler(iter(["a"] * 999), SHAPES, 4, 5)
    again.drawn = 4 * 7
    assert all(torch.equal(w.z, r.z) for w, r in zip(whole[7:], draws(again, 5)))


def test_one_size_draws_what_it_always_drew():
    """So that checkpoints of runs with one size go on as they would have."""
    draw = Sampler(iter(["a"] * 9), [(1, 2, 2)], 1, 5)()
    entropy = np.random.SeedSequence([5, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    expected = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(int(entropy)))
    assert torch.equal(draw.z[0], expected[0]) and torch.equal(draw.eps[0], expected[1])


def test_a_run_with_sizes(tiny_args, tmp_path, monkeypatch):
    """SDXL, which is told the size: every part of a run follows, and a resumed run ends at the same weights."""
    told, call = set(), GeneratorStep.__call__
    note = lambda self, x0, *rest: told.add(x0.shape[2:]) or call(self, x0, *rest)  # noqa: E731
    monkeypatch.setattr(GeneratorStep, "__call__", note)
    model = tiny_sdxl(tmp_path / "model")
    options = ["--pretrained_model_name_or_path", model, "--resolution", 16, "24x16", "--max_train_steps", 6]
    run([*tiny_args, *options])
    assert told == {torch.Size([8, 8]), torch.Size([8, 12])}
    out = tmp_path / "out"
    index = json.loads((out / "model_index.json").read_text())
    assert index["sizes"] == [[16, 16], [16, 24]] and "at 16×16, 24×16 pixels" in (out / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert pipe("a red apple", output_type="pt").images.shape[2:] == (16, 16)
    run([*tiny_args, *options, "--resume_from_checkpoint", "checkpoint-2", "--output_dir", out])
    resumed = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert same(pipe.unet.state_dict(), resumed.unet.state_dict())


def test_other_batches_would_draw_other_sizes(tiny_args, tmp_path):
    args = parse_args([*tiny_args, "--resolution", "16", "24x16"])
    recorded = {"format": FORMAT, "files": {}, "processes": 2, "prompts": {}, "arguments": arguments_of(args)}
    recorded["arguments"] |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    (tmp_path / "checkpoint.json").write_text(json.dumps(recorded))
    args.train_batch_size, args.gradient_accumulation_steps = 2, 2
    with pytest.raises(Mistake, match="each batch draws one size of --resolution: with 2 a step would draw others"):
        check_checkpoint(tmp_path, args, 1)


def test_the_stock_call_of_a_card_draws_the_first_size(tmp_path):
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl(tmp_path))
    pipe = OneStepPipeline.from_pipe(stock, sizes=[[24, 16], [16, 16]])
    scope = {"pipe": pipe}
    exec(stock_call(pipe, "fire"), scope)
    assert scope["image"].size == pipe("fire").images[0].size == (16, 24)


def test_sheets_show_pictures_in_their_own_form(tmp_path):
    tall = torch.ones(1, 3, 20, 10)
    label, head, gap = 230, 26, 4
    assert image_grid({"generator": tall}, ["fire"]).size == (label + 150 + gap, head + 300 + gap)
    assert image_grid({"generator": tall.mT}, ["fire"]).size == (label + 150 + gap, head + 75 + gap)
    picture(tall[0]).save(tmp_path / "00000-0.png")
    sheet = grid({"generator": tmp_path}, [0], Namespace(texts=["fire"]))
    assert sheet.size == (label + 150 + gap, head + 300 + gap)


def test_sizes_that_cannot_be(tiny_args):
    for words, message in (
        (["16", "17x16"], "--resolution 17x16 cannot be made by .*: it must be a multiple of 4"),
        (["16x"], "--resolution must be pixels, as in 1024, or WIDTHxHEIGHT"),
    ):
        with pytest.raises(Mistake, match=message):
            models_of(parse_args([*tiny_args, "--resolution", *words]))
