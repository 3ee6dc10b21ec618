"""What a reward costs on the CPU: `OMP_NUM_THREADS=1 python benchmarks/reward_cost.py`

Each reward at its full size with random weights, one picture of 224 pixels: processor seconds for the score and its
gradient in the pixels, the lesser of two after one to warm up, in float32 and bfloat16. With one thread these are
seconds on the clock of a core that does nothing else. One process for each reward and dtype, one after the other; the
largest needs 8 GB of memory. `hpsv2` stands for `pickscore`, too, which has the same network.
"""

import argparse
import subprocess
import sys
import time

import torch
from transformers import BlipTextModel, BlipVisionModel, CLIPModel

from diff_instruct.rewards.aesthetic import Aesthetic, LinearMLP
from diff_instruct.rewards.clip import ClipScore
from diff_instruct.rewards.hpsv2 import HPSv2
from diff_instruct.rewards.image_reward import ImageReward
from tests.parity.reward_inputs import pictures
from tests.parity.reward_ours import GivenTokens, blip_configs, clip_config


NAMES = ["image_reward", "hpsv2", "clip", "aesthetic"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tokens(length):
    """A tokenizer that makes one prompt as long as the reward can read."""
    return GivenTokens(
        {"input_ids": torch.arange(1, length + 1)[None], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    )


def full_size(name, dtype):
    """The reward of the published size with random weights, made in `dtype`, so that there is one copy."""
    torch.set_default_dtype(dtype)
    if name == "image_reward":
        vision, text = blip_configs("image_reward_full")
        parts = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), LinearMLP(text.hidden_size)
        reward = ImageReward(*parts, tokens(35))
    else:
        config = clip_config(f"{name}_full")
        model = CLIPModel(config)
        if name == "aesthetic":
            reward = Aesthetic(model, LinearMLP(config.projection_dim))
        else:
            reward = {"hpsv2": HPSv2, "clip": ClipScore}[name](name, model, tokens(77))
    torch.set_default_dtype(torch.float32)
    return reward


def measure(name, dtype):
    """(parameters, seconds) of a score with its gradient."""
    reward, pixels, seconds = full_size(name, DTYPES[dtype]), pictures(1, 224, 224).requires_grad_(), []
    for _ in range(3):
        start = time.process_time()
        torch.autograd.grad(reward(pixels, ["a red apple"]).sum(), pixels)
        seconds.append(time.process_time() - start)
    return sum(p.numel() for p in reward.parameters()), min(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--only", choices=DTYPES, help=argparse.SUPPRESS)  # what the process for one dtype is told
    args = parser.parse_args()
    if args.only:
        print(*measure(args.rewards[0], args.only))
        return
    print(f"One picture, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print("| reward | parameters | float32, s | bfloat16, s |\n|---|---|---|---|")
    for name in args.rewards:
        seconds = {}
        for dtype in DTYPES:
            command = [sys.executable, __file__, "--rewards", name, "--only", dtype]
            size, seconds[dtype] = map(float, subprocess.run(command, check=True, stdout=-1, text=True).stdout.split())
        print(f"| `{name}` | {size / 1e6:.0f} M | {seconds['float32']:.2f} | {seconds['bfloat16']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
