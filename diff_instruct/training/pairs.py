"""Pairs (z, x0) of the reference's own: drawn with its own sampler, kept in files, and streamed to learn from.

A generator that learns them before it is distilled starts with the reference's variety: from the same noise it draws
what the reference draws (DMD, arXiv 2311.18828; DMD2's one-step SDXL, arXiv 2405.14867, starts so).
"""

import json
from itertools import islice
from pathlib import Path

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
from diff_instruct.prompts.stream import PromptStream, drawn, random_row
from pipeline_one_step import compute_dtype


SHARD = 64  # pairs in a file
NOISE, ORDER, FURTHER = range(1, 4)  # what random numbers are for


def numbers(seed, what, i):
    """A random number generator of its own for each seed, use and number."""
    entropy = np.random.SeedSequence([seed, what, i]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def needs_pairs(args):
    """Whether a run has them."""
    return args.pair_steps > 0 or args.anchor_scale > 0


def plan_of_pairs(args, models):
    """One line: what pairs cost, before any is drawn.

    Raises:
        Mistake: if there are several sizes of pictures, or pairs in the folder that are made otherwise, as far as the
            arguments tell.
    """
    grid, (size, *others) = models.grid, models.image_sizes
    if others:
        raise Mistake("pairs (--pair_steps, --anchor_scale) are of one size: give one --resolution")
    known_of_pairs(folder_of_pairs(args), how_made(args))
    elements = grid.channels * (size[0] // grid.factor) * (size[1] // grid.factor)
    passes = args.num_pairs * args.pair_sampler_steps * (2 if args.pair_cfg_scale != 1 else 1)
    return (
        f"Pairs: {args.num_pairs:,} of {args.pair_sampler_steps} steps are {passes:,} evaluations of the reference "
        f"for one image, shared by all processes, and {args.num_pairs * elements * 4 / 2**30:.2f} GiB in files."
    )


def folder_of_pairs(args):
    """Where the pairs of a run are."""
    return Path(args.pair_folder or Path(args.output_dir) / "pairs")


def how_made(args):
    """What the arguments tell of how pairs are made."""
    names = ("pair_sampler_steps", "pair_cfg_scale", "seed")
    return {f"--{name}": getattr(args, name) for name in names}


def known_of_pairs(folder, made_of):
    """What `pairs.json` of a folder says; None if there is none.

    Raises:
        Mistake: if it is not what is in `made_of`, or cannot be read.
    """
    about = folder / "pairs.json"
    if not about.exists():
        return None
    try:
        there = json.loads(about.read_text())
    except (OSError, ValueError) as error:
        raise Mistake(f"--pair_folder: {about} cannot be read ({error}): delete the folder") from None
    differ = [k for k in made_of if there.get(k) != made_of[k]]
    if differ:
        raise Mistake(
            f"--pair_folder: the pairs in {folder} are made with another {', '.join(differ)}: name another folder"
        )
    return there


def recipe(args, models, actors):
    """What pairs are made of, and so must be the same in a run that takes up those of another: plain values by name.
    Of a sharded reference all processes call it."""
    network, scheduler = actors.ref.network, actors.stock.scheduler
    weights = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items() if ".lora_" not in k}
    made_of = {
        "reference": checksum({k: whole_tensor(v) for k, v in weights.items()}),
        "sampler": f"{type(scheduler).__name__} {json.dumps(dict(scheduler.config), sort_keys=True, default=str)}",
        "--embedded_guidance": models.embedded_guidance,
        "latents": list(actors.pipe.latent_shape(*models.image_sizes[0])),
        **how_made(args),
    }
    return json.loads(json.dumps(made_of))


class PairFolder:
    """Pairs in files of 64 each, which are whole or absent, and `pairs.json`, which says what they are made of.

    Raises:
        Mistake: if the folder has pairs that are made of something else, or cannot be written.
    """

    def __init__(self, args, made_of, is_main=True):
        self.folder = folder = folder_of_pairs(args)
        there = known_of_pairs(folder, made_of)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_main and there is None:
                write_text(folder / "pairs.json", json.dumps(made_of, indent=2) + "\n")
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


def make_pairs(args, known, actors, folder, missing, device, process_index=0, processes=1):
    """Draw the files that are `missing` in a [`PairFolder`], with a bar; processes, who must all be given the same,
    share them.

    Pair i is the i-th prompt of the shuffled stream, its own noise, and what the stock pipeline with its own sampler
    makes of both; so it is the same whoever makes it. All processes draw equally often: a sharded reference takes all.
    """
    models, stock = known.models, actors.stock
    stream, read = PromptStream(known.train_prompts, args.seed, args.shuffle_buffer_size), 0
    (size,) = models.image_sizes
    shape = actors.pipe.latent_shape(*size)
    dtype = compute_dtype(actors.ref.network)
    rounds = range(0, len(missing), processes)
    what = f"drawing pairs, {SHARD * processes} at a time"
    for first in tqdm(rounds, desc=what, disable=process_index > 0 or not missing):
        own = first + process_index < len(missing)
        shard = missing[min(first + process_index, len(missing) - 1)]
        wanted = range(shard * SHARD, (shard + 1) * SHARD)
        if own or not read:
            prompts = list(islice(stream, wanted.start - read, wanted.stop - read))
            read = wanted.stop
        random = [numbers(args.seed, NOISE, i) for i in wanted]
        z = torch.stack([torch.randn(shape, generator=rng) for rng in random]).half().to(device, dtype)
        x0 = []
        for i in range(0, SHARD, args.train_batch_size):
            part = slice(i, i + args.train_batch_size)
            options = args.pair_sampler_steps, args.pair_cfg_scale, size
            x0.append(sample_latents(models, stock, prompts[part], z[part], *options, random[part]))
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
        """([`Draw`] of B samples with the pairs' prompts and z; their x0, (B, C, H, W)) of draw 0, 1, ..."""
        first = draw * self.batch_size * self.num_processes + self.process_index
        rows = [self.row(first + i * self.num_processes) for i in range(self.batch_size)]
        prompts, random, x0 = zip(*rows)
        return drawn(list(prompts), random, self.device), torch.stack(x0).to(self.device)

    def row(self, position):
        """(prompt; random numbers of a [`Draw`], with the pair's z; x0) of a place in the sequence of epochs."""
        epoch, place = divmod(position, self.number)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.number)
        shard, i = divmod(int(self.order[1][place]), SHARD)
        prompts, file = self.opened.pop(shard, None) or self.folder.read(shard)
        self.opened[shard] = prompts, file  # now the newest
        if len(self.opened) > 64:
            del self.opened[next(iter(self.opened))]
        z, x0 = (file.get_slice(name)[i].float() for name in ("z", "x0"))
        _, *further = random_row(numbers(self.seed, FURTHER, position), z.shape, self.steps)
        return prompts[i], (z, *further), x0


def pair_loss(pair, generator):
    """‖x̂0 − x0*‖², the mean over elements, x0* what the reference makes of z: the generator's x̂0 from z at t*, or, at
    the timestep t_k of a further step k, from x_{t_k} = α x0* + σ ε.

    Args:
        pair ([`Batch`]): with x0* as `target`.
    """
    schedule, pipe = generator.schedule, generator.pipe
    t = torch.tensor(pipe.timesteps, device=pair.z.device)[pair.step]
    first = schedule(t)[1] * pair.z if pipe.config.input_noise == "scaled" else pair.z
    noised = schedule.add_noise(pair.target, pair.eps, t)
    x_t = torch.where((pair.step == 0).view(-1, 1, 1, 1), first, noised)
    return (generator.x0(x_t, t, pair.c) - pair.target).square().mean()
