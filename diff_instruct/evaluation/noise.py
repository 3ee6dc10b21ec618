"""The fixed noise that generators are judged with."""

import torch


def noise_and_generators(shape, prompt_index, n, seed=1234):
    """`fixed_noise`, and the n random number generators that drew it, for what is drawn after it."""
    rngs = [torch.Generator().manual_seed(seed + 1_000_003 * prompt_index + k) for k in range(n)]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]), rngs


def fixed_noise(shape, prompt_index, n, seed=1234):
    """z (n, C, H, W) for the n images of one prompt: the same in every run."""
    return noise_and_generators(shape, prompt_index, n, seed)[0]


def further_noise(pipe, z, prompt_index):
    """The noise of the generator's further steps, a list of n − 1 like z, for the images of one prompt; fixed, too."""
    seeds = [1234 + 100_003 * i for i in range(1, len(pipe.timesteps))]  # not those of z, nor of another prompt
    return [fixed_noise(z.shape[1:], prompt_index, len(z), seed).to(z.device) for seed in seeds]
