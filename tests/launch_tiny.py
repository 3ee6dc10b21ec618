"""What `accelerate launch` starts in the test of two processes: the script, with the tiny scorers for `pocket`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from diff_instruct import rewards  # noqa: E402
from diff_instruct.arguments import parse_args  # noqa: E402
from train_diff_instruct_pp import main  # noqa: E402


if __name__ == "__main__":
    torch.set_num_threads(1)
    rewards.POCKET = Path(sys.argv[1])
    main(parse_args(sys.argv[2:]))
