"""Prompts, streamed through `datasets` from the Hub or from local files, and the samples that are drawn for them."""

from itertools import islice

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from diff_instruct.mistake import Mistake


class PromptStream:
    """An endless, shuffled stream of prompts, this process's share of it, that can be continued exactly.

    Args:
        dataset: from `open_prompts`.
        seed (`int`), buffer_size (`int`): of the shuffle, new in each epoch.
    """

    def __init__(self, dataset, seed, buffer_size, process_index=0, num_processes=1):
        dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self.dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.epoch, self.position = 0, 0
        self.iterator = None

    def __next__(self):
        if self.iterator is None:
            self.dataset.set_epoch(self.epoch)  # `skip` would drop rows before they are shared out, not after
            self.iterator = islice(iter(self.dataset), self.position, None)
        for row in self.iterator:
            self.position += 1
            if row["text"] and row["text"].strip():
                return row["text"]
        if self.position == 0:
            raise Mistake("there are fewer prompts than processes: each process needs at least one")
        self.epoch, self.position, self.iterator = self.epoch + 1, 0, None
        return next(self)

    def state_dict(self):
        """Where the stream stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        """Continue from there."""
        self.epoch, self.position, self.iterator = state["epoch"], state["position"], None


class Sampler:
    """Draws the c, z, t and ε of Algorithm 1; each sample's noise comes from (seed, its number over all processes).

    So a run that is continued draws what it would have drawn, and two processes with batch b draw what one process
    with batch 2b draws.

    Args:
        prompts: a [`PromptStream`].
        steps (`int`): n, those of the generator.
    """

    def __init__(
        self, prompts, latent_shape, batch_size, seed, process_index=0, num_processes=1, device="cpu", steps=1
    ):
        self.prompts, self.latent_shape, self.batch_size, self.seed = prompts, latent_shape, batch_size, seed
        self.process_index, self.num_processes, self.device = process_index, num_processes, device
        self.steps, self.drawn = steps, 0

    def __call__(self):
        """Prompts c, a list of B; noise z and ε, (B, C, H, W) each; u ~ U[0, 1), (B,), to draw timesteps with.

        And for `OneStepPipeline.generate`: the noise of further steps, (n − 1, B, C, H, W), and the step whose x0 is
        taken, uniform on 0..n − 1, (B,).
        """
        prompts, noise, uniform, further, step = [], [], [], [], []
        for _ in range(self.batch_size):
            number = self.drawn * self.num_processes + self.process_index
            entropy = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
            rng = torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))
            prompts.append(next(self.prompts))
            noise.append(torch.randn(2, *self.latent_shape, generator=rng))
            uniform.append(torch.rand((), generator=rng))
            further.append(torch.randn(self.steps - 1, *self.latent_shape, generator=rng))
            step.append(torch.randint(self.steps, (), generator=rng))
            self.drawn += 1
        z, eps = torch.stack(noise, dim=1).to(self.device)
        further, step = torch.stack(further, dim=1).to(self.device), torch.stack(step).to(self.device)
        return prompts, z, eps, torch.stack(uniform), further, step

    def state_dict(self):
        """Where the draws stand."""
        return {"drawn": self.drawn, "prompts": self.prompts.state_dict()}

    def load_state_dict(self, state):
        """Continue from there."""
        self.drawn = state["drawn"]
        self.prompts.load_state_dict(state["prompts"])
