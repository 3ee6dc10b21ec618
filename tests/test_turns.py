"""With `--prompt_cache` text encoders and networks are never on the device together, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from diff_instruct.evaluation.pictures import draw_reference
from diff_instruct.models.actors import load_actors
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import peaks, plan
from diff_instruct.prompts import encoding
from diff_instruct.prompts.conditioning import on_device
from diff_instruct.prompts.encoding import drawing, make_conditioning, takes_turns
from diff_instruct.training.arguments import parse_args
from tests.families import FAMILY, save
from tests.runs import history, run, same, weights


DEVICE = torch.device("cpu:0")  # tells modules that were sent there from those that were sent to "cpu"


@pytest.fixture
def places(monkeypatch):
    """Where each module was sent last."""
    sent, to = {}, torch.nn.Module.to

    def recorded(module, *args, **options):
        if args and isinstance(args[0], (str, torch.device)):
            sent[module] = torch.device(args[0])
        return to(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", recorded)
    return sent


def loaded(words):
    args = parse_args([str(word) for word in words])
    models = models_of(args)
    return args, models, load_actors(models, roles_of(args, models), DEVICE, torch.float32, nullcontext, args)


def test_others_make_room_first(tiny_args):
    moves = []

    class Network:
        def __init__(self, name):
            self.name = name

        def to(self, device):
            moves.append((self.name, device))

    encoder, network = Network("encoder"), Network("network")
    with pytest.raises(ValueError), on_device([encoder], "cuda", instead_of=[network]):
        raise ValueError
    assert moves == [("network", "cpu"), ("encoder", "cuda"), ("encoder", "cpu"), ("network", "cuda")]


@pytest.mark.parametrize(
    "name, kind",
    [("StableDiffusionXLPipeline", "nf4"), *(pytest.param(n, "int8", marks=pytest.mark.slow) for n in FAMILY)],
)
def test_what_the_reference_draws_in_turns(tiny_args, tmp_path, places, name, kind):
    """The same pictures as with all on the device at once; encoders run while all networks are away; and in the end
    all is where it was, without hooks. Then a prompt is encoded, in the place of the networks, too."""
    options = [
        "--pretrained_model_name_or_path",
        save(name, tmp_path / "model"),
        "--lora_rank",
        2,
        "--no-share_base",
        "--cfg_scale",
        1,
    ]
    options += [] if FAMILY[name].flow else ["--timestep", 400, "--input_noise", "unit"]
    options += ["--pretrained_generator_name_or_path", tmp_path / "model", "--ta_lora_rank", 2]
    args, models, actors = loaded(
        [*tiny_args, *options, "--base_quantization", kind, "--prompt_cache", tmp_path / "cache"]
    )
    stock, networks = actors.stock, actors.networks
    assert len(networks) == 2
    encoders = encoding.text_encoders(stock)
    z = torch.randn(2, *actors.pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    size = [n * models.grid.factor for n in z.shape[2:]]
    given = models, stock, ["a red apple", "blue cat"], z, size, 2.0, 2
    with actors.ref.act():
        plain = draw_reference(*given)

    conditioning, seen = make_conditioning(args, actors.pipe, DEVICE, networks), []

    def at_work(module, *_):
        assert places[module] == DEVICE and all(places[n] == torch.device("cpu") for n in networks)
        seen.append(module)

    watched = [encoder.register_forward_hook(at_work) for encoder in encoders]
    with actors.ref.act(), drawing(args, stock, conditioning, networks, DEVICE):
        in_turns = draw_reference(*given)
    unused = 1 if name == "HunyuanImagePipeline" else 0  # its second encoder is for words in quotes
    assert torch.equal(plain, in_turns) and len({id(encoder) for encoder in seen}) == len(encoders) - unused

    def as_before():
        there = all(places[part] == DEVICE for part in (stock.vae, *networks))
        hooked = [m for part in stock.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
        hooked = any(hasattr(m, "_hf_hook") for m in hooked)
        return there and not hooked and all(places[encoder] == torch.device("cpu") for encoder in encoders)

    assert as_before()
    seen.clear()
    conditioning(["a green moon"])
    assert seen and as_before()
    for hook in watched:
        hook.remove()


def test_the_prediction(tiny_args):
    """Alone on the device encoders need what the networks do not."""
    options = [*tiny_args, "--lora_rank", "2", "--ta_lora_rank", "2"]

    def planned(*more):
        args = parse_args([*map(str, options), *more])
        models = models_of(args)
        rows = plan(args, models, "no")
        return peaks(args, models, "no"), sum(
            rows[k]["weights"] for k in ("generator", "teaching assistant", "reference")
        )

    beside, networks = planned("--offload_text_encoder")
    alone, _ = planned("--prompt_cache", "prompts")
    assert beside.pop("encoding of prompts") - alone.pop("encoding of prompts") == networks > 0
    assert beside == alone


def test_sharded_networks_stay(tiny_args, monkeypatch):
    args = parse_args([*map(str, tiny_args), "--prompt_cache", "prompts"])
    assert takes_turns(args) and not takes_turns(parse_args([*map(str, tiny_args), "--offload_text_encoder"]))
    monkeypatch.setattr(encoding, "is_chosen", lambda: True)
    assert not takes_turns(args)


def test_a_run_in_turns(tiny_args, tmp_path):
    """Pairs, training, figures and pictures are those of a run without, and so is one that is resumed."""
    options = "--lora_rank 2 --ta_lora_rank 2 --base_quantization int8 --pair_steps 1 --num_pairs 4".split()
    command = [*tiny_args, *options, "--pair_sampler_steps", 2, "--reuse_generated"]
    run([*command, "--output_dir", tmp_path / "plain"])
    command += ["--prompt_cache", tmp_path / "cache", "--output_dir", tmp_path / "turns"]
    run(command)

    def found(name):
        folder = tmp_path / name
        return weights(folder), history(folder), Image.open(folder / "samples.png").tobytes()

    def equal():
        a, b = found("plain"), found("turns")
        return same(a[0], b[0]) and a[1:] == b[1:]

    assert equal()
    run([*command, "--resume_from_checkpoint", "checkpoint-2"])
    assert equal()
