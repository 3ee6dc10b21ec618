"""Pairs (z, x0) of the reference's own: drawn with its own sampler, kept in files, and streamed to learn from.

A generator that learns them before it is distilled starts with the reference's variety: from the same noise it draws
what the reference draws (DMD, arXiv 2311.18828; DMD2's one-step SDXL, arXiv 2405.14867, starts so).
"""

import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diff_instruct.files import NotWritten, whole, write_text
from diff_instruct.mistake import Mistake
from diff_instruct.models.reference import sample_latents
from diff_instruct.models.sharding import whole as whole_tensor
from diff_instruct.prompts.cache import checksum
from diff_instruct.prompts.stream import PromptStream


SHARD = 64  # pairs in a file
NOISE, ORDER, FURTHER = range(1, 4)  # what random numbers are for


class Pair(NamedTuple):
    """B pairs: their prompts; z and x0, (B, C, H, W); ε ~ N(0, I) like them; and the step, (B,), uniform on 0..n − 1,
    at whose timestep a generator of n steps looks."""

    prompts: list
    z: torch.Tensor
    x0: torch.Tensor
    eps: torch.Tensor
    step: torch.Tensor


def numbers(seed, what, i):
    """A random number generator of its own for each seed, use and number."""
    entropy = np.random.SeedSequence([seed, what, i]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def recipe(args, models, stock, latent_shape):
    """What pairs are made of, and so must be the same in a run that takes up those of another: plain values by name.
    Of a sharded reference all processes call it."""
    network, scheduler = getattr(stock, models.denoiser), stock.scheduler
    weights = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items() if ".lora_" not in k}
    made_of = {
        "reference": checksum({k: whole_tensor(v) for k, v in weights.items()}),
        "sampler": f"{type(scheduler).__name__} {json.dumps(dict(scheduler.config), sort_keys=True, default=str)}",
        "--pair_sampler_steps": args.pair_sampler_steps,
        "--pair_cfg_scale": args.pair_cfg_scale,
        "--embedded_guidance": models.embedded_guidance,
        "latents": list(latent_shape),
        "--seed": args.seed,
    }
    return json.loads(json.dumps(made_of))


class PairFolder:
    """Pairs in files of 64 each, which are whole or absent, and `pairs.json`, which says what they are made of.

    Raises:
        Mistake: if the folder has pairs that are made of something else, or cannot be written.
    """

    def __init__(self, folder, made_of):
        self.folder, about = Path(folder), Path(folder) / "pairs.json"
        try:
            there = json.loads(about.read_text())
        except FileNotFoundError:
            there = None
        except (OSError, ValueError) as error:
            raise Mistake(f"--pair_folder: {about} cannot be read ({error}): delete the folder") from None
        if there not in (None, made_of):
            differ = [k for k in made_of if there.get(k) != made_of[k]]
            raise Mistake(
                f"--pair_folder: the pairs in {folder} are made with another {', '.join(differ)}: name another folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(about, json.dumps(made_of, indent=2) + "\n")
        except OSError as error:
            raise Mistake(f"--pair_folder {folder} cannot be written: {error}") from None

    def file(self, shard):
        """Of pairs 64·`shard` and so on."""
        return self.folder / f"pairs-{shard:06d}.safetensors"

    def missing(self, number):
        """The shards that `number` pairs need and that are not there."""
        return [k for k in range(-(-number // SHARD)) if not self.file(k).exists()]

    def write(self, shard, prompts, z, x0):
        """Write a shard, in half precision.

        Raises:
            Mistake: if an x0 is not finite, or the disk is full.
        """
        tensors = {"z": z.half().cpu().contiguous(), "x0": x0.half().cpu().contiguous()}
        if not all(torch.isfinite(v).all() for v in tensors.values()):
            raise Mistake("--pair_steps: the reference draws latents that are not finite: try --mixed_precision no")
        try:
            with whole(self.file(shard)) as aside:
                save_file(tensors, aside, {"prompts": json.dumps(prompts)})
        except NotWritten as error:
            raise Mistake(f"--pair_folder {self.folder} takes no more pairs: {error}") from None

    def read(self, shard):
        """(prompts, file open for reading) of a shard.

        Raises:
            Mistake: if it is damaged.
        """
        try:
            file = safe_open(self.file(shard), "pt")
            return json.loads(file.metadata()["prompts"]), file
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise Mistake(f"--pair_folder: {self.file(shard)} is damaged ({error}): delete it") from None


def make_pairs(args, models, stock, folder, train_prompts, latent_shape, device, process_index=0, processes=1):
    """Draw the pairs that are missing in a [`PairFolder`], with a bar; processes share them by files.

    Pair i is the i-th prompt of the shuffled stream, its own noise, and what the stock pipeline with its own sampler
    makes of both; so it is the same whoever makes it. All processes draw equally often: a sharded reference takes all.
    """
    missing, wanted = folder.missing(args.num_pairs), iter(())
    stream, read = PromptStream(train_prompts, args.seed, args.shuffle_buffer_size), 0
    dtype, size = getattr(stock, models.denoiser).dtype, [n * models.grid.factor for n in latent_shape[1:]]
    rounds = range(0, len(missing), processes)
    for first in tqdm(rounds, desc=f"drawing {SHARD * processes} pairs", disable=process_index > 0 or not missing):
        own = first + process_index < len(missing)
        shard = missing[min(first + process_index, len(missing) - 1)]
        wanted = range(shard * SHARD, (shard + 1) * SHARD)
        if own or not read:
            prompts = list(islice(stream, wanted.start - read, wanted.stop - read))
            read = wanted.stop
        z = torch.stack([torch.randn(latent_shape, generator=numbers(args.seed, NOISE, i)) for i in wanted])
        z = z.half().to(device, dtype)
        x0 = []
        for i in range(0, SHARD, args.train_batch_size):
            part = slice(i, i + args.train_batch_size)
            options = args.pair_sampler_steps, args.pair_cfg_scale, size
            x0.append(sample_latents(models, stock, prompts[part], z[part], *options))
        if own:
            folder.write(shard, prompts, z, torch.cat(x0))


class PairStream:
    """Draws B pairs at a time from a [`PairFolder`], each once in an epoch, in an order of its own each epoch.

    What is drawn depends on the number of the draw alone, so that a run that is continued has nothing to remember, and
    two processes with batch b draw what one with 2b draws.

    Args:
        number (`int`): of pairs.
        steps (`int`): n, those of the generator.
    """

    def __init__(self, folder, number, batch_size, seed, process_index, num_processes, device="cpu", steps=1):
        self.folder, self.number, self.batch_size, self.seed = folder, number, batch_size, seed
        self.process_index, self.num_processes, self.device, self.steps = process_index, num_processes, device, steps
        self.order, self.opened = (None, None), {}

    def __call__(self, draw):
        """The [`Pair`] of draw 0, 1, ..."""
        first = draw * self.batch_size * self.num_processes + self.process_index
        rows = [self.row(first + i * self.num_processes) for i in range(self.batch_size)]
        prompts, *tensors = zip(*rows)
        return Pair(list(prompts), *(torch.stack(values).to(self.device) for values in tensors))

    def row(self, position):
        """Of a place in the endless sequence of epochs."""
        epoch, place = divmod(position, self.number)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.number)
        shard, i = divmod(int(self.order[1][place]), SHARD)
        prompts, file = self.opened.pop(shard, None) or self.folder.read(shard)
        self.opened[shard] = prompts, file  # now the newest
        if len(self.opened) > 64:
            del self.opened[next(iter(self.opened))]
        z, x0 = (file.get_slice(name)[i].float() for name in ("z", "x0"))
        rng = numbers(self.seed, FURTHER, position)
        return prompts[i], z, x0, torch.randn(z.shape, generator=rng), torch.randint(self.steps, (), generator=rng)


def pair_loss(pair, c, generator):
    """‖x̂0 − x0‖², the mean over elements: the generator's x̂0 from z at t*, or, at the timestep t_k of a further step
    k, from x_{t_k} = α x0 + σ ε of the pair's own x0."""
    schedule, pipe = generator.schedule, generator.pipe
    t = torch.tensor(pipe.timesteps, device=pair.z.device)[pair.step]
    first = schedule(t)[1] * pair.z if pipe.config.input_noise == "scaled" else pair.z
    noised = schedule.add_noise(pair.x0, pair.eps, t)
    x_t = torch.where((pair.step == 0).view(-1, 1, 1, 1), first, noised)
    return (generator.x0(x_t, t, c) - pair.x0).square().mean()
