"""What Algorithm 1 draws, batch by batch."""

import torch

from diff_instruct.models.roles import has_surrogate
from diff_instruct.prompts.encoding import drawing, fill_cache
from diff_instruct.prompts.stream import PromptStream, Sampler
from diff_instruct.surrogate import level_timesteps
from diff_instruct.terms import Batch
from diff_instruct.training.pairs import PairFolder, PairStream, make_pairs, recipe
from diff_instruct.training.standards import PICTURES


class Draws:
    """The batches of an optimizer step: c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I).

    Args:
        sampler ([`Sampler`]): of prompts and random numbers.
        encode: prompts to conditioning.
        schedule ([`Schedule`]): of the networks.
        passes (`int`): batches of an optimizer step, one for each forward and backward pass.
        low, high: π(t)'s ends, as fractions of the schedule.
        shift: s of π(t), see `shifted`.
        pairs ([`PairStream`], *optional*): of the reference's own.
        anchored_from (`int`, *optional*): the generator's steps take pairs, from those of this step on.

    `draws.prompts` are those of the batches since it was last cleared.
    """

    def __init__(self, sampler, encode, schedule, passes, low, high, shift=1.0, pairs=None, anchored_from=None):
        self.sampler, self.encode, self.schedule, self.pairs = sampler, encode, schedule, pairs
        self.passes, self.low, self.high, self.shift = passes, low, high, shift
        self.anchored_from, self.prompts = anchored_from, []

    def __call__(self):
        """Yield the [`Batch`]es of one optimizer step."""
        for _ in range(self.passes):
            yield self.batch(self.sampler())

    def of_theta(self, step):
        """Yield those of the generator's step: of pairs, if it has an anchor."""
        return self() if self.anchored_from is None else self.of_pairs(self.anchored_from + step)

    def of_pairs(self, number):
        """Yield those of optimizer step 0, 1, ... on pairs: c and z are theirs, and x0 is the `target`."""
        for i in range(number * self.passes, (number + 1) * self.passes):
            draw, x0 = self.pairs(i)
            yield self.batch(draw)._replace(target=x0)

    def batch(self, draw):
        """The [`Batch`] of a [`Draw`]."""
        self.prompts.extend(draw.prompts)
        c, t, again = self.encode(draw.prompts), self.pi(draw.u), (self.pi(draw.u_again), draw.eps_again)
        return Batch(draw.prompts, c, draw.z, draw.noise, draw.step, t, draw.eps, again=again)

    def pi(self, u):
        """t ~ π(t), (B,), of u ~ U[0, 1)."""
        u = u if self.shift == 1 else shifted(u, self.low, self.high, self.shift)
        return self.schedule.timesteps(u, self.low, self.high).to(self.sampler.device)

    def groups(self, n):
        """Yield those of a surrogate's step: n samples for each prompt, all after the same step of the generator.
        Their t are levels for [`Surrogate`]: those of a group at equal distances in log-SNR, from an offset that is
        drawn. Of G groups, samples g, g + G, g + 2 G, ... are one: so processes share out whole groups."""
        for _ in range(self.passes):
            draw = self.sampler()
            groups = len(draw.prompts) // n
            prompts, step = draw.prompts[:groups] * n, draw.step[:groups].repeat(n)
            u = (torch.arange(n).repeat_interleave(groups) + draw.u[:groups].repeat(n)) / n
            t = level_timesteps(u, self.schedule, self.low, self.high).to(draw.z.device)
            yield self.batch(draw._replace(prompts=prompts, step=step))._replace(t=t)


def shifted(u, low, high, s):
    """The place between `low` and `high`, in [0, 1), of σ = s v / (1 + (s − 1) v), v uniform where σ is between them:
    how samplers of flow matching shift noise levels (SD3, arXiv 2403.03206, eq. 23). More noise for s > 1."""
    first, last = (x / (s - (s - 1) * x) for x in (low, high))
    v = first + u * (last - first)
    return ((s * v / (1 + (s - 1) * v) - low) / (high - low)).clamp(0, 1 - 2**-24)


def images_per_step(args, accelerator):
    """How many images an optimizer step sees, on all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def make_draws(args, accelerator, known, actors, encode, with_pairs):
    """The [`Draws`] of a run; with `--prompt_cache` all prompts that it will need are encoded, and pairs are drawn
    that are missing."""
    index, processes, pipe = accelerator.process_index, accelerator.num_processes, actors.pipe
    stream = PromptStream(
        known.train_prompts, args.seed, args.shuffle_buffer_size, index, processes, args.allow_bad_rows
    )
    sampler = Sampler(
        stream,
        [pipe.latent_shape(*size) for size in known.models.image_sizes],
        args.train_batch_size,
        args.seed,
        process_index=index,
        num_processes=processes,
        device=accelerator.device,
        steps=len(pipe.timesteps),
    )
    if args.prompt_cache:
        steps = args.ta_warmup_steps + (args.ta_steps + 1) * (args.pretrain_steps + args.max_train_steps)
        steps += args.max_train_steps * has_surrogate(args)
        most = steps * images_per_step(args, accelerator)
        if args.reward_standardize:
            most = max(most, PICTURES + args.train_batch_size * processes)
        others = ["", *known.eval_prompts, *known.validation_prompts]
        fill_cache(args, encode, known.train_prompts, others, most, index, processes)
    return Draws(
        sampler,
        encode,
        pipe.schedule,
        args.gradient_accumulation_steps,
        args.min_timestep,
        args.max_timestep,
        args.timestep_shift,
        make_pair_stream(args, accelerator, known, actors, encode) if with_pairs else None,
        anchored_from=args.pair_steps if args.anchor_scale else None,
    )


def make_pair_stream(args, accelerator, known, actors, encode):
    """The [`PairStream`] of a run, after pairs that are missing have been drawn by all processes."""
    place = accelerator.process_index, accelerator.num_processes
    with actors.ref.act(), drawing(args, actors.stock, encode, actors.networks, accelerator.device):
        folder = PairFolder(args, recipe(args, known.models, actors), accelerator.is_main_process)
        missing = folder.missing(args.num_pairs)
        accelerator.wait_for_everyone()  # all see the same are missing: none has been drawn yet
        make_pairs(args, known, actors, folder, missing, accelerator.device, *place)
    accelerator.wait_for_everyone()
    return PairStream(
        folder,
        args.num_pairs,
        args.train_batch_size,
        args.seed,
        *place,
        device=accelerator.device,
        steps=len(actors.pipe.timesteps),
    )
