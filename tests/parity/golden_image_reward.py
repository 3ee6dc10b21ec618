"""Does our ImageReward score as its authors say? `python tests/parity/golden_image_reward.py`

Four pictures of one prompt, with the scores in the README of https://github.com/zai-org/ImageReward. The published
weights and the pictures are downloaded (1.8 GB and 1.2 MB) or, without network, given as local copies:
`--images FOLDER` with 1.webp to 4.webp, and `--reward_checkpoint image_reward=PATH` as for training. Ends with status
1 if a score is further than 0.01 from theirs: they say that theirs depend on the device, and we do not round resized
pictures to 8 bits.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_url
from PIL import Image

from diff_instruct.rewards.image_reward import FILE, REPO
from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.specs import RewardSpec, split_pairs


PICTURES = (
    "https://raw.githubusercontent.com/zai-org/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/assets/images"
)
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN = {"1.webp": 0.5811622738838196, "2.webp": 0.2745276093482971,
          "3.webp": -1.4131819009780884, "4.webp": -2.029569625854492}  # fmt: skip
TOLERANCE = 0.01


def fetch(url, advice, method="GET"):
    """What is at `url`, in bytes. Raises ValueError, which ends with `advice`, if it cannot be had."""
    try:
        with urlopen(Request(url, method=method), timeout=10) as answer:
            return answer.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be had ({error}). {advice}") from None


def download_pictures(folder):
    """Writes the four pictures in `folder`. Raises ValueError if they cannot be had."""
    for name in GOLDEN:
        advice = "Download it and the other three, and give their folder: --images FOLDER"
        (folder / name).write_bytes(fetch(f"{PICTURES}/{name}", advice))


def read_picture(file):
    """Pixels (1, 3, H, W) in [0, 1]. Raises ValueError if there is no such picture."""
    try:
        picture = np.array(Image.open(file).convert("RGB"))
    except OSError as error:
        raise ValueError(f"--images: {file} is no picture ({error})") from None
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


def check_hub():
    """Raises ValueError at once if the Hub cannot be reached: huggingface_hub itself tries for half a minute."""
    if not constants.HF_HUB_OFFLINE:
        advice = "Download it and give its place: --reward_checkpoint image_reward=PATH"
        fetch(hf_hub_url(REPO, FILE), advice, method="HEAD")


def compare(images, checkpoint):
    """Prints scores beside the published ones; are they the same? Raises ValueError if something is not there."""
    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            images = folder
            download_pictures(Path(folder))
        pixels = [read_picture(Path(images) / name) for name in GOLDEN]
    if checkpoint is None:
        check_hub()
    reward = load_reward(RewardSpec("image_reward", checkpoint=checkpoint), trained=False)
    with torch.no_grad():
        scores = [reward(p, [PROMPT]).item() for p in pixels]
    print("| picture | published | here | difference |\n|---|---|---|---|")
    for (name, golden), score in zip(GOLDEN.items(), scores):
        print(f"| {name} | {golden:.5f} | {score:.5f} | {score - golden:+.5f} |")
    return all(abs(score - golden) <= TOLERANCE for golden, score in zip(GOLDEN.values(), scores))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder with 1.webp to 4.webp; default: downloaded")
    parser.add_argument(
        "--reward_checkpoint", nargs="+", help="image_reward=PATH, a local ImageReward.pt or its folder; default: Hub"
    )
    args = parser.parse_args()
    try:
        good = compare(args.images, split_pairs("reward_checkpoint", args.reward_checkpoint).get("image_reward"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("the published scores" if good else f"NOT the published scores: more than {TOLERANCE} apart")
    sys.exit(not good)


if __name__ == "__main__":
    main()
