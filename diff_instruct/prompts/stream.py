"""Prompts in an endless, shuffled order that processes share, and the samples that are drawn for them."""

import logging
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.rows import MOST_FAULTS, Skipped, captions, problem


logger = logging.getLogger(__name__)

WAITS = (1, 4, 16, 64, 256)  # seconds before a broken stream is read again; `datasets` has tried for minutes before
ENOUGH = 1000  # rows that are read before the share of those that cannot be used is judged


class StreamBroken(RuntimeError):
    """The prompts cannot be read any further, although it was tried for minutes; the run can be continued later."""


class TooManyFaults(StreamBroken):
    """More than 1% of the rows of the stream cannot be used; the run can be continued with --allow_bad_rows."""


class PromptStream:
    """An endless, shuffled stream of prompts, this process's share of it, that can be continued exactly.

    The epochs, each in its own order, form one endless sequence; process k of n takes its places k, k + n, k + 2n and
    so on, across the seams of epochs. So n processes together see what one sees, whatever the numbers of prompts and
    files. Each process reads all rows, which are short.

    The state is the place in the sequence, the same on all processes after equally many draws: a run may be continued
    with another number of them. `datasets` cannot save its buffer, so the epoch is read again up to there; the source
    must be unchanged.

    Args:
        dataset: from `load_prompts`.
        seed (`int`), buffer_size (`int`): of the shuffle, new in each epoch.
        process_index (`int`), num_processes (`int`): k and n.
        allow_bad_rows (`bool`): whether more than 1% of the rows may be left out.

    Attributes:
        used (`int`): rows that could be used, counted as `skipped`.
        skipped ([`Skipped`]): rows that could not be used, counted in one pass over the source, as far as it got.
    """

    def __init__(self, dataset, seed, buffer_size, process_index=0, num_processes=1, allow_bad_rows=True):
        self.skipped, self.used, self.counted, self.warned = Skipped(), 0, False, False
        self.seed, self.allow_bad_rows = seed, allow_bad_rows
        # one file after the other, in an order of its own each epoch: `datasets` reads several at a time in threads,
        # and could wait for ever when one of its iterators was left before its end
        self.dataset = dataset.filter(self.is_usable).shuffle(
            seed=seed, buffer_size=buffer_size, max_buffer_input_shards=1
        )
        self.process_index, self.num_processes = process_index, num_processes
        self.load_state_dict({"epoch": 0, "position": 0})

    def is_usable(self, row):
        why = problem(row)
        if not self.counted:
            if why is None:
                self.used += 1
            else:
                self.skipped.add(row, why)
        return why is None

    def __iter__(self):
        return self

    def __next__(self):
        self.read_ahead(1)
        prompt, self.state = self.ahead.popleft()
        return prompt

    def read_ahead(self, number):
        """Hold at least so many of the next prompts ready: no stream can break under the next `number` draws.

        Raises:
            StreamBroken: if it breaks now; what was drawn, and the state, stay as they are.
            Mistake: if the source has no prompt that can be used.
        """
        while len(self.ahead) < number:
            block = [self.read() for _ in range(self.num_processes)]
            self.ahead.append((block[self.process_index], {"epoch": self.epoch, "position": self.position}))

    def read(self):
        """The next prompt of the endless sequence."""
        for wait in (*WAITS, None):
            try:
                return self.try_to_read()
            except (Mistake, TooManyFaults):
                raise
            except Exception as error:  # libraries for networks and formats have no class of errors in common
                self.rows = None
                what = f"the prompts cannot be read ({type(error).__name__}: {error})"
                if wait is None:
                    raise StreamBroken(f"{what}, after {len(WAITS)} attempts to read on") from error
                logger.warning(f"{what}; next attempt in {wait} s")
                time.sleep(wait)

    def try_to_read(self):
        while True:
            if self.rows is None:
                if not self.counted:
                    self.skipped.clear()  # the epoch is read from its start
                    self.used = 0
                self.dataset.set_epoch(self.epoch)
                self.rows = islice(iter(self.dataset), self.position, None)
            row = next(self.rows, None)
            if row is not None:
                self.position += 1
                self.check()
                return self.one_of(captions(row))
            self.counted = True
            self.check()
            if self.position == 0:
                raise Mistake(f"the training prompts have none that can be used: {self.skipped}")
            self.epoch, self.position, self.rows = self.epoch + 1, 0, None

    def one_of(self, texts):
        """One of a row's captions, which depends on the seed and the place in the sequence alone."""
        if len(texts) == 1:
            return texts[0]
        drawn = np.random.SeedSequence([self.seed, self.epoch, self.position]).generate_state(1)[0]
        return texts[int(drawn) % len(texts)]

    def check(self):
        """One line about rows that cannot be used, as soon as there is one; raises TooManyFaults at more than 1%."""
        faults = self.skipped.faults
        if faults and not self.warned:
            self.warned = True
            if self.process_index == 0:
                logger.warning(f"prompts left out so far: {self.skipped}")
        rows = self.used + faults
        if not self.allow_bad_rows and faults > MOST_FAULTS * rows and (self.counted or rows >= ENOUGH):
            why = f"{faults:,} of the {rows:,} rows of prompts read so far cannot be used: {self.skipped.kinds(True)}"
            raise TooManyFaults(f"{why}; --allow_bad_rows leaves them out")

    def state_dict(self):
        """Where the stream stands: the epoch and how many of its prompts all processes have drawn."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Continue from there."""
        self.epoch, self.position = state["epoch"], state["position"]  # of the reader, which may be ahead
        self.state, self.rows, self.ahead = dict(state), None, deque()


class Draw(NamedTuple):
    """What Algorithm 1 draws for B samples; `noise` and `step` are for a generator of n steps."""

    prompts: list  # c, B of them
    z: torch.Tensor  # (B, C, H, W) ~ N(0, I)
    eps: torch.Tensor  # (B, C, H, W) ~ N(0, I)
    u: torch.Tensor  # (B,) ~ U[0, 1), to draw timesteps with
    noise: torch.Tensor  # (n − 1, B, C, H, W) ~ N(0, I), of its further steps
    step: torch.Tensor  # (B,), the step whose x0 is taken, uniform on 0..n − 1
    eps_again: torch.Tensor  # (B, C, H, W) ~ N(0, I): with `u_again`, to noise the same x0 another time
    u_again: torch.Tensor  # (B,) ~ U[0, 1)


def random_row(rng, latent_shape, steps):
    """What a [`Draw`] has of random numbers for one sample."""
    z, eps = torch.randn(2, *latent_shape, generator=rng)
    u, noise = torch.rand((), generator=rng), torch.randn(steps - 1, *latent_shape, generator=rng)
    step = torch.randint(steps, (), generator=rng)
    return z, eps, u, noise, step, torch.randn(latent_shape, generator=rng), torch.rand((), generator=rng)


def drawn(prompts, rows, device):
    """The [`Draw`] of B samples, on the device; u is on the CPU, where timesteps are made of it."""
    z, eps, u, noise, step, eps_again, u_again = zip(*rows)
    z, eps, step, eps_again = (torch.stack(v).to(device) for v in (z, eps, step, eps_again))
    noise = torch.stack(noise, dim=1).to(device)
    return Draw(prompts, z, eps, torch.stack(u), noise, step, eps_again, torch.stack(u_again))


class Sampler:
    """Draws the c, z, t and ε of Algorithm 1; each sample's noise comes from (seed, its number over all processes).

    So a run that is continued draws what it would have drawn, and two processes with batch b draw what one process
    with batch 2b draws. The state is the same on all processes.

    Args:
        prompts: a [`PromptStream`].
        latent_shapes: (C, H, W) of each size that is trained; of several, each call draws one, all processes the same.
        steps (`int`): n, those of the generator.
    """

    def __init__(
        self, prompts, latent_shapes, batch_size, seed, process_index=0, num_processes=1, device="cpu", steps=1
    ):
        self.prompts, self.latent_shapes, self.batch_size, self.seed = prompts, latent_shapes, batch_size, seed
        self.process_index, self.num_processes, self.device = process_index, num_processes, device
        self.steps, self.drawn = steps, 0

    def __call__(self):
        """A [`Draw`] of `batch_size` samples."""
        prompts, rows = [], []
        shape = self.latent_shapes[0]
        if len(self.latent_shapes) > 1:
            rng = np.random.default_rng([self.seed, self.drawn, len(self.latent_shapes)])
            shape = self.latent_shapes[rng.integers(len(self.latent_shapes))]
        for _ in range(self.batch_size):
            entropy = np.random.SeedSequence([self.seed, self.drawn + self.process_index])
            rng = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            prompts.append(next(self.prompts))
            rows.append(random_row(rng, shape, self.steps))
            self.drawn += self.num_processes
        return drawn(prompts, rows, self.device)

    def read_ahead(self, draws):
        """Read the prompts of so many calls: then none of them raises `StreamBroken`, halfway through a step."""
        self.prompts.read_ahead(draws * self.batch_size)

    def state_dict(self):
        """Where the draws stand: how many samples all processes have drawn, and the stream's state."""
        return {"drawn": self.drawn, "prompts": self.prompts.state_dict()}

    def load_state_dict(self, state):
        """Continue from there."""
        self.drawn = state["drawn"]
        self.prompts.load_state_dict(state["prompts"])
