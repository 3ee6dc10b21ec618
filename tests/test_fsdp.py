"""FSDP2 in two processes on the CPU (gloo), against one process with all of it."""

import errno
import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file

import train_diff_instruct_pp as script
from diff_instruct.mistake import Mistake
from diff_instruct.models import tensors
from diff_instruct.models.actors import load_actors
from diff_instruct.models.lora import merged, trained_parameters
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sharding import place, whole
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import plan
from diff_instruct.training import finish, set_up
from diff_instruct.training.arguments import parse_args
from tests.families import FLOW, SIDES, save
from tests.processes import Run
from tests.runs import QUICK, checkpoints, from_turbo, run, same, trained, weights
from tests.tiny import PROMPTS, tiny_pixart, tiny_sd, tiny_sdxl


ROOT = Path(script.__file__).parent
ONE_BASE = ["--lora_rank", 2, "--ta_lora_rank", 2]


def slow(*options):
    """These options of a test, in the runs that take minutes."""
    return pytest.param(list(options), marks=pytest.mark.slow)


def launched(*options):
    """What `accelerate launch` with these options sets in the environment of its processes."""
    with pytest.MonkeyPatch.context() as m, warnings.catch_warnings():
        m.setattr(torch.cuda, "device_count", lambda: 4)
        before = dict(os.environ)
        arguments = launch_command_parser().parse_args([*options, script.__file__])
        environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
        for name in os.environ.keys() - before.keys():
            m.delenv(name)
    return {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_")) and before.get(k) != v}


def as_on_gpus():
    """In each process: accelerate takes FSDP's branches, which it has for GPUs alone; and shares are counted."""
    initialize, load_actors, end_trackers, networks = (
        AcceleratorState.__init__,
        set_up.load_actors,
        finish.end_trackers,
        {},
    )

    def initialized(self, *args, fsdp_plugin=None, **options):
        first = not self.initialized
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if first and fsdp_plugin is not None and torch.distributed.is_initialized():
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    def loaded(*args):
        actors = load_actors(*args)
        networks.update({name: getattr(actors, name).network for name in ("generator", "ta", "ref")})
        networks["vae"], networks["text_encoder"] = actors.stock.vae, actors.stock.text_encoder
        return actors

    def ended(accelerator):
        for name, network in networks.items():
            mine = [getattr(p, "_local_tensor", p).numel() for p in network.parameters()]
            print("held", name, sum(mine), "of", sum(p.numel() for p in network.parameters()), flush=True)
        end_trackers(accelerator)

    AcceleratorState.__init__, set_up.load_actors, finish.end_trackers = initialized, loaded, ended


def two(arguments, folder, before=as_on_gpus, processes=2):
    """The lines that a run of two processes with FSDP2 printed."""
    log = folder.with_suffix(".log")
    environment = launched("--config_file", str(ROOT / "recipes" / "4gpu_fsdp2.yaml"))
    codes = Run([*arguments, "--output_dir", folder], log, processes, environment, before).wait()
    assert codes == [0] * processes, log.read_text()[-5000:]
    return log.read_text().splitlines()


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=0)


def files(folder):
    """What an export has, without what the number of processes changes."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts}
    return {name for name in found if not name.endswith(("-1.json", "_1.pkl"))}


@pytest.fixture
def common(tiny_args, tmp_path):
    """A run of three steps, whose weights move by far more than what is tolerated."""
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"{p} {w}" for p in PROMPTS for w in ("red", "blue", "green", "moon", "fire", "cat")))
    options = [*tiny_args, "--train_prompts", prompts, "--max_train_steps", 3, "--adam_epsilon", 1e-3]
    return [*options, "--checkpointing_steps", 2, "--mixed_precision", "no"]


@pytest.mark.parametrize(
    "options",
    [
        slow(),
        [*ONE_BASE, "--gradient_accumulation_steps", 2, "--gradient_checkpointing"],
        slow(*ONE_BASE, "--divergence", "score", "--huber_c", 0.1, "--gradient_checkpointing"),
        slow("--ta_lora_rank", 2, "--generator_steps", 3, "--preset", "didr"),
        slow("--reward_mode", "surrogate", "--surrogate_group", 2, "--generator_steps", 2),
        slow(*ONE_BASE, "--reward_mode", "surrogate", "--surrogate_group", 2, "--surrogate_lora_rank", 2),
        slow("turbo"),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(common, tmp_path, options):
    """Weights, averages, evaluation, files; shares while training; and a checkpoint that two processes continue."""
    options = from_turbo(common, tmp_path / "turbo") if options == ["turbo"] else options
    run([*common, *options, "--train_batch_size", 4, "--output_dir", tmp_path / "one"])
    arguments = [*common, *options, "--train_batch_size", 2]
    lines = two(arguments, tmp_path / "two")
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    close(one, both, 1e-5)
    for name in ("generator", "teaching_assistant", *["surrogate"] * ("surrogate" in options)):
        close(*(trained(tmp_path / n, 3, name) for n in ("one", "two")), 1e-5)
    start = trained(tmp_path / "one", 2)
    assert max((v - start[k]).abs().max() for k, v in trained(tmp_path / "one", 3).items()) > 1e-4
    summaries = [json.loads((tmp_path / n / "training_summary.json").read_text()) for n in ("one", "two")]
    for key in ("reward_before", "reward_after", "heldout_after", "diversity_after"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], abs=1e-4)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert (tmp_path / "one" / "transformer" / "config.json").read_text() == (
        tmp_path / "two" / "transformer" / "config.json"
    ).read_text()

    held = [line.split() for line in lines if line.startswith("held")]
    assert len(held) == 2 * 5
    for _, name, mine, _, all_of_it in held:
        part = int(mine) / int(all_of_it)
        assert part == 1 if name in ("vae", "text_encoder") else abs(part - 0.5) < 0.02, name

    two([*arguments, "--resume_from_checkpoint", "checkpoint-2"], tmp_path / "two")
    assert same(both, weights(tmp_path / "two"))


@pytest.mark.slow
def test_the_export_loads_and_draws(common, tmp_path):
    """From an SDXL with LoRA, whose files are three: merged weights, the LoRA by itself, and the rest."""
    tiny_sdxl(tmp_path / "sdxl")
    arguments = [*common, "--pretrained_model_name_or_path", tmp_path / "sdxl", *ONE_BASE, *QUICK]
    arguments += ["--max_train_steps", 2]
    run([*arguments, "--train_batch_size", 2, "--output_dir", tmp_path / "one"])
    two([*arguments, "--train_batch_size", 1], tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        close(load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name), 1e-5)
    drawn = []
    for name in ("one", "two"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(torch.from_numpy(pipe(PROMPTS[0], generator=generator, output_type="np").images))
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [[], slow(*ONE_BASE)])
def test_another_number_of_processes_goes_on(common, tmp_path, options):
    """Two with FSDP2, one without, one with twice the accumulation, and back: each from the checkpoint of step 2."""
    common = [*common, *QUICK, *options]
    as_one = [*common, "--train_batch_size", 4]
    run([*as_one, "--output_dir", tmp_path / "one"])
    two([*common, "--train_batch_size", 2], tmp_path / "two")
    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-again")
    run([*as_one, "--output_dir", tmp_path / "two-again", "--resume_from_checkpoint", "checkpoint-2"])
    more = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "checkpoint-2"]
    two([*common, *more], tmp_path / "one-again")
    for name in ("one", "two"):
        for network in ("generator", "teaching_assistant"):
            assert same(*(trained(tmp_path / n, 2, network) for n in (name, f"{name}-again")))
            close(*(trained(tmp_path / n, 3, network) for n in (name, f"{name}-again")), 1e-6)
        close(weights(tmp_path / name), weights(tmp_path / f"{name}-again"), 1e-6)


def test_one_process_holds_all(common, tmp_path):
    """And `--use_fsdp --fsdp_version 2` needs no config file."""
    common = [*common, *QUICK, "--max_train_steps", 1]
    run([*common, "--output_dir", tmp_path / "plain"])
    Run(
        [*common, "--output_dir", tmp_path / "fsdp"],
        tmp_path / "log",
        environment=launched("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"),
    ).wait()
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "fsdp"))


@pytest.mark.parametrize("options", [slow(), [*ONE_BASE, "--gradient_checkpointing"]])
def test_bfloat16(common, tmp_path, options):
    """A frozen base in bfloat16 and float32 adapters in one unit; and what is averaged and stepped stays float32."""
    common = [*common, *QUICK, *options, "--mixed_precision", "bf16", "--max_train_steps", 2]
    run([*common, "--train_batch_size", 2, "--output_dir", tmp_path / "one"])
    two([*common, "--train_batch_size", 1], tmp_path / "two")
    state = trained(tmp_path / "two", 2)
    assert {v.dtype for v in state.values()} == {torch.float32}
    close(trained(tmp_path / "one", 2), state, 5e-3)  # a step is 1e-3


def full_disk():
    """In each process: the first file that the main one writes into a checkpoint finds no room."""
    as_on_gpus()
    write, calls = tensors.write_tensors, []

    def fails_once(path, *args):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *args)

    tensors.write_tensors = fails_once


def test_a_full_disk_leaves_no_process_waiting(common, tmp_path):
    """The checkpoint of step 1 is not there, the run goes on, that of step 2 is whole."""
    arguments = [*common, *QUICK, "--max_train_steps", 2, "--checkpointing_steps", 1, "--train_batch_size", 1]
    lines = two(arguments, tmp_path / "out", full_disk)
    assert sum("checkpoint-1 could not be written" in line for line in lines) == 1
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]


@pytest.mark.parametrize(
    "variables, options, message",
    [
        ({"FSDP_VERSION": "1"}, [], "FSDP1 is not supported: set `fsdp_version: 2`"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "`fsdp_offload_params: true` is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "it is --gradient_checkpointing here"),
        ({}, ["--use_8bit_adam"], "--use_8bit_adam does not work with FSDP2"),
        ({}, ["--offload_ema"], "--offload_ema does not work with FSDP2"),
    ],
)
def test_what_does_not_work_with_it(tiny_args, tmp_path, monkeypatch, variables, options, message):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Mistake, match=message) as error:
        run([*tiny_args, *options])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


def test_the_plan_is_that_of_a_share(tiny_args, monkeypatch):
    args = parse_args([str(a) for a in tiny_args])
    whole = plan(args, models_of(args), "no")
    monkeypatch.setattr("diff_instruct.plan.memory_plan.processes", lambda: 4)
    share = plan(args, models_of(args), "no")
    for actor in ("generator", "teaching assistant", "reference"):
        assert share[actor] == {k: v // 4 for k, v in whole[actor].items()}
    assert share["vae"] == whole["vae"]


@pytest.fixture
def alone(monkeypatch):
    """A group of one process, which is enough for weights to be gathered and freed."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def held_by_a_graph(network, dtype):
    """Bytes that the graph of one pass keeps in tensors with the shape of one of the network's matrices."""
    shapes = {tuple(m.shape) for p in network.parameters() if p.ndim == 2 for m in (p, p.T)}
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            sizes, c = {"resolution": None, "aspect_ratio": None}, torch.randn(1, 3, 16)
            network(torch.randn(1, 4, 8, 8), c, torch.tensor([3]), added_cond_kwargs=sizes)
    storages = {t.untyped_storage() for t in held if tuple(t.shape) in shapes}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gathered_weight_outlives_its_block(alone, dtype):
    """Under autocast a graph would keep a bfloat16 copy of each weight, if blocks were not gathered in bfloat16."""
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, caption_channels=16,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2,
    )  # fmt: skip
    whole = held_by_a_graph(network, dtype)
    assert whole > 0.8 * dtype.itemsize * sum(p.numel() for p in network.parameters() if p.ndim == 2)
    assert held_by_a_graph(place(network, "cpu", dtype), dtype) < 0.1 * whole


def passes_and_gradients(command):
    """All networks of a run at work, as in Algorithm 1: tensors, whole, by name."""
    args = parse_args([str(a) for a in command])
    torch.manual_seed(0)  # adapters are drawn
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), "cpu", torch.float32, nullcontext, args)
    generator, ta, ref = actors.generator, actors.ta, actors.ref
    parameters = [trained_parameters(role.network, role.adapter) for role in (generator, ta)]
    for p in (p for part in parameters for p in part.values()):
        p.requires_grad_(True)
    rng, shape = torch.Generator().manual_seed(0), actors.pipe.latent_shape(args.resolution, args.resolution)
    z, eps = torch.randn(2, 2, *shape, generator=rng)
    with torch.no_grad():
        t, c = torch.tensor([300, 700]), actors.pipe.encode_prompt(["a red apple", "blue cat"])
    ta.loss(z, eps, t, c).backward()
    x0 = generator.generate(z, c)
    leaf = x0.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ta.x0(leaf, t, c).square().mean(), leaf)
    with torch.no_grad():
        from_ref = ref.x0(leaf, t, c)
    x0.backward(gradient)
    found = {"x0": x0.detach(), "gradient": gradient, "reference": from_ref}
    for name, part in zip("gt", parameters):
        found |= {f"{name}.{k}": whole(p.grad) for k, p in part.items() if p.grad is not None}
        found |= {f"{name}.moved.{k}": make() for k, make in merged(generator.network, "generator").items()}
    return found


NAMES = [
    name for name in FLOW if name not in ("SanaSprintPipeline", "schnell")
]  # whose networks are Sana's and FLUX's
OTHERS = {"PixArtAlphaPipeline": tiny_pixart, "StableDiffusionPipeline": tiny_sd}
OFTEN = ("PixArtAlphaPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "SanaPipeline")
IN_FULL = "ZImagePipeline", "StableDiffusionPipeline"


@pytest.mark.parametrize(
    "name, options",
    [
        *(
            pytest.param(
                name, [*ONE_BASE, "--gradient_checkpointing"], marks=() if name in OFTEN else pytest.mark.slow
            )
            for name in [*NAMES, *OTHERS]
        ),
        *((name, []) for name in IN_FULL),
    ],
)
def test_networks_of_all_families_are_sharded(tiny_args, tmp_path, monkeypatch, alone, name, options):
    """Nothing in them reads a weight where its block does not compute: passes and gradients are as without."""
    save(name, tmp_path / "model") if name in FLOW else OTHERS[name](tmp_path / "model")
    command = [*tiny_args, "--pretrained_model_name_or_path", tmp_path / "model", "--cfg_scale", 1, *options]
    command += ["--resolution", SIDES[name]]
    sharded = passes_and_gradients(command)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    plain = passes_and_gradients(command)
    assert sum(k.startswith(("g.", "t.")) for k in plain) > 10
    assert plain.keys() == sharded.keys()
    for key, value in plain.items():
        torch.testing.assert_close(value, sharded[key], atol=1e-6, rtol=1e-4)
