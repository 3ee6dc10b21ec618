"""What tests of runs share: to run the script in this process, to see its actors, to compare what it wrote."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_diff_instruct_pp as script
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.lora import add_lora
from diff_instruct.models.sources import models_of
from diff_instruct.training import finish, set_up
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.history import TIMINGS


# Options of a run that judges and draws as little as can be.
QUICK = ["--report_to", "none", "--num_eval_prompts", 1, "--validation_steps", 0, "--num_validation_prompts", 1]


def run(arguments):
    script.main(parse_args([str(a) for a in arguments]))


def weights(folder):
    """The generator's, of an exported PixArt pipeline."""
    return load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors")


def trained(folder, step, name="generator"):
    """What a checkpoint holds of a trained network, without its average."""
    state = load_file(Path(folder) / f"checkpoint-{step}" / f"{name}.safetensors")
    return {k: v for k, v in state.items() if not k.startswith("average.")}


def checkpoints(folder):
    return sorted(p.name for p in Path(folder).glob("*checkpoint-*"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def history(folder):
    """The rows of a run, without what no two runs have in common."""
    rows = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def turbo_of(network, folder, scale=0.3):
    """The network, and one that differs in every layer and every norm, saved in a folder."""
    turbo = type(network).from_config(network.config)
    turbo.load_state_dict(network.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for p in turbo.parameters():
            p += scale * p.std(correction=0) * torch.randn_like(p) if p.ndim > 1 else 0
    turbo.save_pretrained(folder)
    return turbo


def from_turbo(command, folder):
    """Options with which a generator starts as the closest LoRA of a turbo, whose network is written to the folder."""
    stock = load_reference(models_of(parse_args([str(a) for a in command])), torch.float32)
    turbo_of(stock.transformer, folder)
    start = ["--pretrained_generator_name_or_path", folder, "--timestep", 400, "--input_noise", "unit"]
    return [*start, "--lora_rank", 4, "--ta_lora_rank", 2]


def load(command):
    """(args, models, stock pipeline, generator's pipeline) of a command, before training."""
    args = parse_args([str(a) for a in command])
    models = models_of(args)
    stock = load_reference(models, torch.float32)
    pipe = load_generator(models, stock)
    if args.lora_rank:
        add_lora(pipe.denoiser, "generator", args.lora_rank, args.lora_alpha, models.lora_targets)
    return args, models, stock, pipe


def watch_actors(monkeypatch, *looks):
    """Let each of the functions see the actors of the next run, as soon as they are loaded."""
    load_actors = set_up.load_actors

    def watched(*args):
        actors = load_actors(*args)
        for look in looks:
            look(actors)
        return actors

    monkeypatch.setattr(set_up, "load_actors", watched)


def watch_export(monkeypatch, look):
    """Let a function see the pipeline of the next run as it is exported, with the average that ships."""
    export = finish.export

    def watched(args, models, pipe, *rest):
        look(pipe)
        return export(args, models, pipe, *rest)

    monkeypatch.setattr(finish, "export", watched)
