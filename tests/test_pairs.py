"""Pairs of the reference's own: what they are, that a run goes on with them exactly, the anchor; and x0 for two."""

import json
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.reference import sample, sample_latents
from diff_instruct.objectives import KAPPA
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.terms import Alpha, Anchor, Batch
from diff_instruct.training import draws
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.draws import Draws, shifted
from diff_instruct.training.pairs import PairFolder, PairStream, pair_loss
from diff_instruct.training.watch import Watch
from pipeline_one_step import Schedule
from tests import families
from tests.runs import history, load, run, same, trained, watch_actors, weights
from tests.tiny import PROMPTS


FEW = ["--num_pairs", 64, "--pair_sampler_steps", 2]


class Stop(Exception):
    """A kill, between two steps."""


def stop_after(monkeypatch, step):
    """The next run writes a checkpoint after this step and is gone."""
    after = Watch.after

    def watched(watch, now, alpha):
        after(watch, now, alpha)
        if now == step:
            raise Stop

    monkeypatch.setattr(Watch, "after", watched)


@pytest.mark.parametrize("name", families.BUILD)
def test_latents_decode_to_the_stock_s_pictures(tmp_path, name):
    """x0 of a pair is in the generator's own form and scale: decoded, it is what the stock pipeline draws, guided."""
    folder, side = families.save(name, tmp_path / "model"), families.SIDES[name]
    words = ["--train_prompts", __file__, "--reward", "pocket", "--output_dir", tmp_path / "out", "--cfg_scale", 1]
    _, models, stock, pipe = load(["--pretrained_model_name_or_path", folder, "--resolution", side, *words])
    z = torch.randn(2, *pipe.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    options = models, stock, PROMPTS[:2], z, 2, 3.0 if models.family.has_null else 1.0, (side, side)
    expected = sample(*options, 1, [torch.Generator().manual_seed(i) for i in range(2)])
    x0 = sample_latents(*options, [torch.Generator().manual_seed(i) for i in range(2)])
    assert x0.shape == z.shape
    with torch.no_grad():
        torch.testing.assert_close(pipe.decode(x0).clamp(0, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [[], ["--generator_steps", 2, "--lora_rank", 2, "--ta_lora_rank", 2]])
def test_a_run_goes_on_anywhere_as_if_never_stopped(quick_args, tmp_path, monkeypatch, options):
    """Pairs, a warm-up, then alignment with an anchor and one x0 for both: killed among the pairs, between them and
    the warm-up, and in alignment, whose pairs are then found where they are; bit for bit."""
    common = [*quick_args, *FEW, "--pair_steps", 3, "--ta_warmup_steps", 1, "--max_train_steps", 3, *options]
    common += ["--anchor_scale", 0.1, "--reuse_generated", "--checkpointing_steps", 1, "--lr_scheduler", "linear"]
    run([*common, "--output_dir", tmp_path / "whole"])
    pairs = ["--pair_folder", tmp_path / "whole" / "pairs"]
    for resumed, step in ((False, -4), (True, -2), (True, 0)):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(patch, step)
            run([*common, *pairs, *(["--resume_from_checkpoint", "latest"] if resumed else [])])
    run([*common, *pairs, "--resume_from_checkpoint", "latest"])
    assert not (tmp_path / "out" / "pairs").exists()
    assert same(trained(tmp_path / "whole", 3), trained(tmp_path / "out", 3))
    assert same(
        trained(tmp_path / "whole", 3, "teaching_assistant"), trained(tmp_path / "out", 3, "teaching_assistant")
    )
    assert history(tmp_path / "whole") == history(tmp_path / "out")
    rows = {row["step"]: row for row in history(tmp_path / "whole") if "learning_rate" in row}
    assert [step for step in rows if "pair_loss" in rows[step]] == [-3, -2, -1]
    assert [step for step in rows if "ta_loss" in rows[step]] == [0, 1, 2, 3]
    assert all("norm_anchor" in rows[step] for step in (1, 2, 3))


def test_algorithm_1_starts_from_the_regression_s_average(quick_args, tmp_path):
    """As from an export of it: average, weights and learning rate; and the pairs have been learnt."""
    common = [*quick_args, *FEW, "--pair_steps", 30, "--pair_learning_rate", 1e-2, "--max_grad_norm", 1e9]
    run([*common, "--max_train_steps", 0, "--checkpointing_steps", 30])
    state = load_file(tmp_path / "out" / "checkpoint-0" / "generator.safetensors")
    averages = {k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")}
    assert same(averages, {k: v for k, v in state.items() if k in averages})
    exported = weights(tmp_path / "out")
    assert all(torch.equal(exported[k], averages[k]) for k in averages)
    losses = [row["pair_loss"] for row in history(tmp_path / "out") if "pair_loss" in row]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), losses


def test_pairs_are_the_same_whoever_draws_them(quick_args, tmp_path):
    """What is missing is drawn again, alike; pairs of another guidance, or damaged, are refused in one line."""
    common = [*quick_args, *FEW, "--num_pairs", 130, "--pair_steps", 1, "--max_train_steps", 0]
    run(common)
    folder = tmp_path / "out" / "pairs"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3 and json.loads((folder / "pairs.json").read_text())["--pair_cfg_scale"] == 4.5
    before = load_file(files[1])
    assert before["z"].shape == before["x0"].shape == (64, 4, 8, 8) and before["z"].dtype == torch.float16
    assert abs(before["z"].float().std() - 1) < 0.05
    files[1].unlink()
    again = [*common, "--overwrite_output_dir", "--train_batch_size", 4]
    run(again)
    for key, value in load_file(files[1]).items():
        torch.testing.assert_close(value, before[key], atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="made with another --pair_cfg_scale: name another folder"):
        run([*again, "--pair_cfg_scale", 2])
    files[0].write_bytes(b"damaged")
    with pytest.raises(ValueError, match="pairs-000000.safetensors is damaged"):
        run(again)


def test_each_pair_comes_once_in_an_epoch_whatever_the_processes(quick_args, tmp_path):
    run([*quick_args, *FEW, "--pair_steps", 1, "--max_train_steps", 0])
    args = parse_args([str(a) for a in [*quick_args, "--overwrite_output_dir"]])
    folder = PairFolder(args, json.loads((tmp_path / "out" / "pairs" / "pairs.json").read_text()))

    def draws(batch, index, processes):
        stream = PairStream(folder, 60, batch, 5, index, processes, steps=3)
        return [stream(i) for i in range(30)]

    one, two = draws(4, 0, 1), [draws(2, rank, 2) for rank in range(2)]
    for i, (draw, x0) in enumerate(one):
        for rank in range(2):
            share, part = two[rank][i]
            assert torch.equal(part, x0[rank::2]) and share.prompts == draw.prompts[rank::2]
            assert all(torch.equal(a, b[rank::2]) for a, b in zip(share[1:4], draw[1:4]))
    seen = [tuple(x.flatten()[:8].tolist()) for _, x0 in one for x in x0]
    assert len(set(seen[:60])) == len(set(seen[60:])) == 60 and seen[:60] != seen[60:]


def test_the_loss_on_pairs_looks_where_the_generator_will(tiny_args):
    """Of the first step it is that of g_θ(z, c); of a later one that of the network at the noised x0*."""
    *_, pipe = load([*tiny_args, "--generator_steps", 2, "--input_noise", "scaled"])
    generator, c = Denoiser(pipe, pipe.denoiser), Conditioning(pipe.encode_prompt, "cpu")(PROMPTS[:2])
    z, eps, x0 = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pair = Batch(PROMPTS[:2], c, z, z[None], torch.tensor([0, 1]), None, eps, target=x0)
    with torch.no_grad():
        first = generator.generate(z, c, z[None], torch.tensor([0, 0]))[0] - x0[0]
        t = torch.tensor([pipe.timesteps[1]] * 2)
        later = generator.x0(pipe.schedule.add_noise(x0, eps, t), t, c)[1] - x0[1]
        expected = torch.stack([first, later]).square().mean()
        torch.testing.assert_close(pair_loss(pair, generator), expected, rtol=1e-4, atol=0)


def test_the_anchor_is_the_gradient_of_half_the_square():
    x0, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step, leaf = torch.tensor([0, 1, 0]), x0.clone().requires_grad_()
    (0.5 * 3 * KAPPA / 16 * (leaf - target)[step == 0].square().sum()).backward()
    noised = Namespace(x0=leaf, batch=Batch([], {}, x0, x0, step, None, x0, target=target))
    part = Anchor(3.0).gradient(noised)["anchor"]
    torch.testing.assert_close(part, leaf.grad)
    assert not part.requires_grad and not Anchor(0.0).acts(Alpha(1.0)) and Anchor(3.0).acts(Alpha(1.0))


def test_one_x0_for_both_saves_a_pass_and_is_noised_anew(quick_args, monkeypatch):
    """With K_TA = 2 two generator passes an iteration instead of three; TA and θ see the same x0 at other levels."""
    calls = []

    def look(actors):
        actors.generator.network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    for options, expected in (([], [False, False, True]), (["--reuse_generated"], [True, False])):
        calls.clear()
        with monkeypatch.context() as patch:
            watch_actors(patch, look)
            run([*quick_args, "--ta_steps", 2, "--max_train_steps", 1, "--overwrite_output_dir", *options])
        first = next(i for i in range(len(calls)) if calls[i]) - expected.index(True)
        assert calls[first : first + len(expected)] == expected, calls
    schedule = Schedule(DDPMScheduler())
    shape, sampler = (2, 4, 8, 8), Namespace(device="cpu")
    draw = Namespace(prompts=["a", "b"], u=torch.rand(2), u_again=torch.rand(2), noise=None, step=None)
    draw.z, draw.eps, draw.eps_again = torch.randn(3, *shape)
    batch = Draws(sampler, lambda prompts: {}, schedule, 1, 0.02, 0.98).batch(draw)
    other = batch.noised_again()
    assert torch.equal(other.z, batch.z) and torch.equal(other.eps, draw.eps_again)
    assert torch.equal(other.t, schedule.timesteps(draw.u_again, 0.02, 0.98)) and not torch.equal(other.t, batch.t)


@pytest.mark.parametrize("s", [3.0, 0.5])
def test_shifted_noise_levels(s):
    """σ = s v / (1 + (s − 1) v) for uniform v, kept between the ends: the share below a level is its v's."""
    schedule, low, high = Schedule(FlowMatchEulerDiscreteScheduler()), 0.02, 0.98
    draws = Draws(Namespace(device="cpu"), None, schedule, 1, low, high, s)
    t = draws.pi(torch.linspace(0, 1, 100_001)[:-1])
    assert t.min() == 20 and t.max() == 980
    v = lambda sigma: sigma / (s - (s - 1) * sigma)  # noqa: E731
    for level in (0.1, 0.5, 0.9):
        expected = (v(level) - v(low)) / (v(high) - v(low))
        assert (t < level * 1000).double().mean().item() == pytest.approx(expected, abs=5e-3)
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted(u, low, high, 1.0), u)


def test_mistakes(tiny_args):
    with pytest.raises(ValueError, match="--timestep_shift is of flow matching"):
        run([*tiny_args, "--timestep_shift", 3])


def test_processes_agree_on_what_is_missing_before_one_draws(monkeypatch):
    """A slow process that looked after another had written would leave out its share."""
    told, somewhere = [], Namespace(network=None, networks=(), timesteps=(0,), act=nullcontext)
    monkeypatch.setattr(draws, "PairFolder", lambda *_: Namespace(missing=lambda n: told.append("looks") or [0]))
    monkeypatch.setattr(draws, "recipe", lambda *_: {})
    monkeypatch.setattr(draws, "drawing", lambda *_: nullcontext())
    monkeypatch.setattr(draws, "make_pairs", lambda *_: told.append("draws"))
    accelerator = Namespace(
        process_index=0, num_processes=2, is_main_process=True, device="cpu",
        wait_for_everyone=lambda: told.append("waits"),
    )  # fmt: skip
    actors = Namespace(ref=somewhere, stock=None, networks=(), pipe=somewhere)
    args = Namespace(num_pairs=64, train_batch_size=2, seed=0)
    draws.make_pair_stream(args, accelerator, Namespace(models=None), actors, None)
    assert told == ["looks", "waits", "draws", "waits"]
