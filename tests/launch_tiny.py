"""What `accelerate launch` starts in the test of two processes: the script, with the tiny scorers for `pocket`."""

import sys
from pathlib import Path

import torch

from diff_instruct.rewards import loading as rewards
from diff_instruct.training.arguments import parse_args
from train_diff_instruct_pp import main


if __name__ == "__main__":
    torch.set_num_threads(1)
    rewards.POCKET = Path(sys.argv[1])
    main(parse_args(sys.argv[2:]))
