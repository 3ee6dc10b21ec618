"""What a run holds in memory, and that nothing that saves some changes its results."""

import copy
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from diff_instruct.families import FAMILIES
from diff_instruct.models.actors import load_actors
from diff_instruct.models.decoder import checkpoint_decoder, frozen_convolution
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.lora import (
    Merged,
    acting,
    add_lora,
    checkpoint_block,
    checkpoint_network,
    lora_layers,
    merged,
    trained_parameters,
)
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.models.tensors import save_network
from diff_instruct.plan import advice
from diff_instruct.plan.activations import Live, activations
from diff_instruct.plan.memory_plan import GIB
from diff_instruct.terms import Alpha, Batch
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.steps import generator_step, ta_loss
from tests.families import BUILD, FAMILY, save
from tests.runs import run


BF16 = ["--lora_rank", 2, "--ta_lora_rank", 2, "--gradient_checkpointing", "--mixed_precision", "bf16"]
TARGETS = FAMILIES["PixArtAlphaPipeline"].lora_targets


def mean_green(pixels, prompts):
    """A reward: the mean of the green channel."""
    return pixels[:, 1].mean(dim=(1, 2))


@pytest.fixture
def adapted(tiny_model):
    """(plain network, the same with adapters that do something)."""
    plain, network = (PixArtTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer") for _ in range(2))
    add_lora(network, "generator", 2, 4, TARGETS)
    for p in trained_parameters(network, "generator").values():
        torch.nn.init.normal_(p, std=0.3)
    return plain, network


@pytest.mark.parametrize("size", ["10GB", "5KB"])
def test_merging_writes_what_diffusers_would_with_one_tensor_in_memory(adapted, tmp_path, monkeypatch, size):
    """Names, values, shards and index; and no tensor is made before the one before it is gone."""
    plain, network = adapted
    plain.load_state_dict({k: make() for k, make in merged(network, "generator").items()})
    plain.save_pretrained(tmp_path / "whole", max_shard_size=size)

    make, made = Merged.__call__, []

    def counted(weight):
        assert sum(tensor() is not None for tensor in made) <= 1  # the caller's name for the one before
        tensor = make(weight).clone()
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Merged, "__call__", counted)
    save_network(network, tmp_path / "streamed", merged(network, "generator"), max_shard_size=size)
    whole, streamed = (sorted((tmp_path / name).iterdir()) for name in ("whole", "streamed"))
    assert [p.name for p in whole] == [p.name for p in streamed] and len(made) == len(plain.state_dict())
    assert (len(whole) > 3) == (size == "5KB")
    for one, other in zip(whole, streamed):
        if one.suffix == ".safetensors":
            one, other = load_file(one), load_file(other)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "streamed").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in plain.state_dict().items())


def test_a_tensor_of_another_shape_is_not_written(adapted, tmp_path):
    state = merged(adapted[1], "generator")
    state["proj_out.bias"].weight = torch.zeros(3)
    with pytest.raises(ValueError, match="expected a tensor"):
        save_network(adapted[1], tmp_path, state)


@pytest.mark.parametrize(
    "options",
    [
        ["--cfg_interval", 0, 0.5],
        BF16,
        [*BF16, "--base_quantization", "nf4"],
    ],
)
def test_predicted_activations_are_those_of_real_tensors(tiny_args, options):
    """The TA's phase on the loaded actors, counted while it runs, against what is said before anything is loaded."""
    args = parse_args([str(a) for a in [*tiny_args, *options]])
    models, half = models_of(args), args.mixed_precision == "bf16"
    predicted = activations(args, models, args.mixed_precision or "no")
    assert predicted["generator's step"] > predicted["validation"] > 0

    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if half else nullcontext
    actors = load_actors(
        models, roles_of(args, models), "cpu", torch.bfloat16 if half else torch.float32, autocast, args
    )
    for role in (actors.generator, actors.ta):
        for p in trained_parameters(role.network, role.adapter).values():
            p.requires_grad_(True)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        c = actors.pipe.encode_prompt(["a"] * 2)
    one = Batch(["a"] * 2, c, z, z[:0], torch.zeros_like(t), t, z)
    with Live() as live:
        counted = live.highest(lambda: ta_loss(one, actors.generator, actors.ta).backward())
    assert predicted["teaching assistant's step"] == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    "gib, words",
    [
        (50, "It fits into 50 GiB, and so does a batch of about 10."),
        (7, "It fits into 7 GiB with --gradient_checkpointing --reward_batch_size 1: 6.00 GiB."),
        (
            4,
            "It fits into 4 GiB with --gradient_checkpointing --reward_batch_size 1 --train_batch_size 1 --gra",
        ),
        (1, "It does not fit into 1 GiB: 3.00 GiB even with --gradient_checkpointing --reward_batch_size 1 --train"),
    ],
)
def test_what_fits_is_said(tiny_args, monkeypatch, capsys, gib, words):
    """In a world of 5 GiB for each of two images, 4 with checkpointing, 3 if they are also decoded one by one."""

    def peak(args, *_):
        each = 5 - args.gradient_checkpointing - (args.reward_batch_size == 1)
        return "generator's step", args.train_batch_size * each * GIB

    monkeypatch.setattr(advice, "peak", peak)
    run([*tiny_args, "--dry_run", "--memory_gib", gib])
    said = capsys.readouterr().out
    assert words in said
    assert "--offload_text_encoder" not in said  # `--prompt_cache`, which comes after it, does the same and more


def test_no_flag_is_advised_beside_one_that_makes_it_needless(tiny_args, monkeypatch, capsys):
    """Neither by what a run needs nor by what would have helped one that is out of memory."""
    monkeypatch.setattr(advice, "peak", lambda args, *_: ("validation", (5 - bool(args.prompt_cache)) * GIB))
    run([*tiny_args, "--dry_run", "--memory_gib", 4])
    said = capsys.readouterr().out
    assert " --prompt_cache prompts: 4.00 GiB." in said and "--offload_text_encoder" not in said

    monkeypatch.setattr(advice, "peak", lambda args, *_: ("validation", 5 * GIB))
    args = parse_args([str(a) for a in [*tiny_args, "--lora_rank", 2, "--ta_lora_rank", 2]])
    said = advice.advice(args, models_of(args), 4)
    assert "--base_quantization nf4" in said and "int8" not in said

    def fake(args, *_):
        size = 9 - 3 * bool(args.prompt_cache or args.offload_text_encoder) - (args.base_quantization != "none")
        return {"text_encoder": {"weights": size * GIB}}

    monkeypatch.setattr(advice, "plan", fake)
    said = advice.what_would_help(args)
    assert "--prompt_cache prompts, --base_quantization nf4" in said
    assert "--offload_text_encoder" not in said and "int8" not in said


@pytest.mark.parametrize("method", [[], ["--divergence", "score", "--huber_c", 0.1], ["--preset", "didr"]])
def test_one_base_for_three_roles_equals_three_networks(tiny_args, method):
    """Gradients of both adapters, with checkpointing on the one base, against separate copies without it."""
    options = [*tiny_args, *method, "--lora_rank", 2, "--ta_lora_rank", 2, "--gradient_checkpointing"]
    args = parse_args([str(a) for a in options])
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.float32, nullcontext, args)
    assert actors.generator.network is actors.ta.network is actors.ref.network
    rng = torch.Generator().manual_seed(1)
    for role in (actors.generator, actors.ta):
        for p in trained_parameters(role.network, role.adapter).values():
            p.data = torch.randn(p.shape, generator=rng) * 0.2
    copies = [copy.deepcopy(actors.ref.network) for _ in range(3)]
    for network in copies:
        network.disable_gradient_checkpointing()
    separate = [Denoiser(actors.pipe, n, role) for n, role in zip(copies, ("generator", "ta", None))]

    z, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([300, 700])
    with torch.no_grad():
        c, null = (actors.pipe.encode_prompt(prompts) for prompts in (["a red apple", "blue cat"], ["", ""]))
    one = Batch(["a"] * 2, c, z, z[:0], torch.zeros_like(t), t, eps)

    def gradients(generator, ta, ref):
        for role in (generator, ta):
            for p in trained_parameters(role.network, role.adapter).values():
                p.requires_grad_(True)
        ta_loss(one, generator, ta).backward()
        x0 = generator.generate(z, c)
        of_ta = trained_parameters(ta.network, "ta").values()
        found = [p.grad.clone() for p in of_ta]
        for p in of_ta:
            p.requires_grad_(False)
        gradient_at_x0 = generator_step(args, ta, ref, null, mean_green, actors.pipe.decode)
        dL_dx0, _ = gradient_at_x0(x0, one, Alpha(cfg=3.0, rew=2.0))
        for p in of_ta:
            p.requires_grad_(True)
        x0.backward(dL_dx0)
        return found + [p.grad for p in trained_parameters(generator.network, "generator").values()]

    shared, apart = gradients(actors.generator, actors.ta, actors.ref), gradients(*separate)
    assert len(shared) == len(apart) and all(g.abs().max() > 0 for g in apart)
    for one_base, own_base in zip(shared, apart):
        torch.testing.assert_close(one_base, own_base, rtol=1e-4, atol=1e-5 * own_base.abs().max().item())


@pytest.mark.parametrize("name", ["SanaPipeline", "QwenImagePipeline", "FluxPipeline", "Flux2KleinPipeline"])
def test_a_decoder_is_checkpointed_from_outside(name):
    """Exactly the same picture, and the same gradient but for the rounding of another kernel (a transposed
    convolution), for less memory; less than diffusers' own, where there is such."""
    torch.manual_seed(0)
    stock = BUILD[name]()
    vae, family = stock.vae.requires_grad_(False), FAMILY[name]
    z = torch.randn(1, family.grid(getattr(stock, family.denoiser).config, vae.config).channels, 16, 16)

    def drawn():
        """(pixels, gradient at x0, most bytes that both passes hold)."""
        x0, kept = z.clone().requires_grad_(), []

        def both():
            kept.append(family.decode(stock, x0))
            kept[0].square().sum().backward()

        with Live() as live:
            held = live.highest(both)
        return kept[0].detach(), x0.grad, held

    picture, gradient, held = drawn()
    if vae._supports_gradient_checkpointing:
        vae.train().enable_gradient_checkpointing()
        held = drawn()[-1]
        vae.eval().disable_gradient_checkpointing()
    checkpoint_decoder(vae)
    again, same, less = drawn()
    assert torch.equal(picture, again) and less < 0.8 * held
    torch.testing.assert_close(gradient, same, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_frozen_convolution_holds_nothing_of_its_input(dimensions):
    conv = (nn.Conv2d, nn.Conv3d)[dimensions - 2](3, 5, 3, padding=(1, 0, 2)[:dimensions], dilation=2).double()
    x = torch.randn(2, 3, *(7, 8, 9)[:dimensions], dtype=torch.float64, requires_grad=True)
    conv.requires_grad_(False)
    y = conv(x)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        again = frozen_convolution(conv, x, conv.weight, conv.bias)
    assert torch.equal(y, again) and held and all(t is not x and t.shape == conv.weight.shape for t in held)
    torch.testing.assert_close(torch.autograd.grad(again, x, gradient)[0], expected)


def test_blocks_that_diffusers_leaves_out_are_checkpointed():
    """Krea 2's text fusion: the same gradient, for less memory."""
    torch.manual_seed(0)
    stock, family = BUILD["Krea2Pipeline"](), FAMILY["Krea2Pipeline"]
    network = stock.transformer.requires_grad_(False)
    add_lora(network, "generator", 2, None, family.lora_targets)
    trained = trained_parameters(network, "generator")
    for p in trained.values():
        p.data = torch.randn_like(p.requires_grad_(True))
    text = torch.randn(1, 64, len(network.text_fusion.projector.weight[0]), network.config.text_hidden_dim)
    given = {"hidden_states": torch.randn(1, 16, network.config.in_channels), "timestep": torch.rand(1)}
    given |= {"encoder_hidden_states": text, "position_ids": torch.zeros(80, 3)}

    def gradient():
        """(of each adapter, bytes that the graph holds)"""
        for p in trained.values():
            p.grad = None
        with Live() as live, acting(lora_layers(network), "generator"):
            x = network(**given).sample
            held = live.now
        with acting(lora_layers(network), None):  # as when another role's turn has come
            x.square().sum().backward()
        return [p.grad for p in trained.values()], held

    plain, _ = gradient()
    network.enable_gradient_checkpointing(checkpoint_block)
    _, held = gradient()
    checkpoint_network(network, family)
    again, less = gradient()
    assert less < 0.5 * held
    for one, other in zip(again, plain):
        assert torch.equal(one, other) and one.abs().max() > 0


@pytest.mark.parametrize("name", ["FluxPipeline", pytest.param("ZImagePipeline", marks=pytest.mark.slow)])
def test_a_rounded_base_is_predicted_without_contents(tiny_args, tmp_path, name):
    """Of other families, too: codes, scales and what decodes them."""
    folder = save(name, tmp_path / "reference")
    options = [*BF16, "--pretrained_model_name_or_path", folder, "--base_quantization", "nf4", "--cfg_scale", 1]
    args = parse_args([*tiny_args, *map(str, options)])
    found = activations(args, models_of(args), "bf16")
    assert found["generator's step"] > found["validation"] > 0
