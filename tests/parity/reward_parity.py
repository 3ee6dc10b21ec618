"""Are our rewards those of the original packages? `python tests/parity/reward_parity.py --environment FOLDER`

Builds an isolated environment in FOLDER if there is none (it wants pip and a package index): Python 3.11 with
image-reward 1.5, hpsv2 1.2.0, hpsv3 1.0.0 and what they need, old transformers and timm. `reward_oracle.py` runs in
it: random weights in the published layout, scores and pixel gradients by the original code. Here the same checkpoint
is read with our code, the same pictures are scored and the differences printed; it ends with status 1 if one is above
its bar. hpsv3 is compared at a small size only.
All cases together take six and a half minutes of a core, 12 GB of memory and 5 GB in $TMPDIR; `--cases` names some.

The bars hold for score and pixel gradient on the same picture (1e-5), and for the score of PIL pictures of other sizes
(2e-3; PickScore, which is about 100 cosines, 0.2), in the package's unit. PIL rounds what it resized to 8 bits and we
do not: that is all of the last difference. At the 28 or 32 pixels of a tiny network it says nothing, so that its bar
holds at 224 pixels only.

`--save tests/oracle` keeps the outputs (not the weights, which are drawn again by name) for the default tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from tests.parity.reward_inputs import CONFIGS, reward_of
from tests.parity.reward_ours import bar, differences, load


ORACLE = Path(__file__).with_name("reward_oracle.py")
TORCH = "torch==2.13.0"
REQUIREMENTS = [
    "transformers==4.38.2", "tokenizers==0.15.2", "numpy==1.26.4", "pillow", "setuptools<81", "ftfy", "regex",
]  # fmt: skip
WITHOUT_DEPENDENCIES = [
    "image-reward==1.5", "hpsv2==1.2.0", "timm==0.6.13", "torchvision==0.15.2", "clip-anytorch==2.6.0",
    "fairscale==0.4.13",
]  # fmt: skip
FOR_HPSV3 = ["hpsv3==1.0.0", "transformers==4.45.2", "tokenizers==0.20.3"]  # in a folder that is searched first


def build_environment(folder):
    """A virtual environment with the original packages; they pin what excludes each other, so without dependencies.

    Raises:
        ValueError: if it cannot be built; nothing of it is left then.
    """
    pip = [str(Path(folder) / "bin" / "pip"), "install", "-q"]
    try:
        subprocess.run(["python3.11", "-m", "venv", folder], check=True)
        subprocess.run([*pip, TORCH, *REQUIREMENTS], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", *WITHOUT_DEPENDENCIES], check=True)
        subprocess.run([*pip, "--no-deps", "--target", Path(folder) / "hpsv3", *FOR_HPSV3], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{folder} cannot be built: it needs python3.11 and a package index ({error})") from None


def run_oracle(python, case, folder):
    """Writes the checkpoint and the outputs of the original package in `folder`. Raises ValueError if it fails."""
    first = {"PYTHONPATH": str(Path(python).parents[1] / "hpsv3")} if reward_of(case) == "hpsv3" else {}
    command, env = [python, str(ORACLE), case, str(folder)], {**os.environ, **first}
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=env)
    if process.returncode:
        raise ValueError(f"{case}: the original package failed: {process.stderr.strip().splitlines()[-1:]}")


def passes(case, found, outputs):
    """Are the differences from `outputs` that were found no larger than their bars?"""
    same = all(found[k] <= bar(outputs[k]) for k in ("score", "gradient"))
    near = found["end_to_end"] <= (0.2 if case == "pickscore_full" else 2e-3)
    return same and (near or CONFIGS[case]["image"] != 224)


def compare(python, case, save):
    """Prints a row of the table; are the differences no larger than their bars?"""
    with tempfile.TemporaryDirectory() as folder:
        folder, start = Path(folder), time.time()
        run_oracle(python, case, folder)
        outputs = load_file(folder / "outputs.safetensors")
        found = differences(case, load(case, folder), outputs)
        if save and case.endswith("tiny"):
            kept = Path(save) / case
            kept.mkdir(parents=True, exist_ok=True)
            for name in ("outputs.safetensors", "shapes.json"):
                shutil.copyfile(folder / name, kept / name)
    largest = outputs["gradient"].abs().max()
    spread = outputs["end_to_end"].max() - outputs["end_to_end"].min()
    cells = [found["score"], found["gradient"], largest, found["end_to_end"], spread]
    print(f"| {case} | {' | '.join(f'{v:.1e}' for v in cells)} | {time.time() - start:.0f} |", flush=True)
    return passes(case, found, outputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", required=True, help="folder of the isolated environment")
    parser.add_argument("--cases", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--save", help="keep the outputs of the tiny cases in this folder")
    args = parser.parse_args()
    python = Path(args.environment).resolve() / "bin" / "python"
    try:
        if not python.exists():
            build_environment(args.environment)
        print("| case | score | pixel gradient | its largest | from PIL | spread from PIL | seconds |")
        print("|---|---|---|---|---|---|---|")
        good = [compare(str(python), case, args.save) for case in args.cases]
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
