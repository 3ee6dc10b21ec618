"""Are our rewards those of the original packages? `python benchmarks/reward_parity.py --environment FOLDER`

Builds an isolated environment in FOLDER if there is none (it wants pip and a package index): Python 3.11 with
image-reward 1.5, hpsv2 1.2.0 and what they need, old transformers and timm. `reward_oracle.py` runs in it: random
weights in the published layout, scores and pixel gradients by the original code. Here the same checkpoint is read with
our code, the same pictures are scored and the differences printed; it ends with status 1 if one is above its bar.

`--save tests/oracle` keeps the outputs (not the weights, which are drawn again by name) for the default tests.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BatchEncoding, BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reward_oracle import CONFIGS, PROMPTS, SIZES, bytes_of, pictures, random_state  # noqa: E402
from diff_instruct.rewards.checkpoint import load_tokenizer, read  # noqa: E402
from diff_instruct.rewards.hpsv2 import HPSv2  # noqa: E402
from diff_instruct.rewards.image_reward import ImageReward  # noqa: E402


ORACLE = Path(__file__).with_name("reward_oracle.py")
# Score and pixel gradient on the same picture; score of a PIL picture, which is resized. In the package's unit. PIL
# rounds what it resized to 8 bits and we do not: that is all of the last difference, and at the 32 pixels of a tiny
# network it says nothing, so that the bar holds at 224 pixels only.
BARS = {"score": 1e-5, "gradient": 1e-5, "end_to_end": 2e-3}
TORCH = "torch==2.13.0"
REQUIREMENTS = [
    "transformers==4.38.2", "tokenizers==0.15.2", "numpy==1.26.4", "pillow", "setuptools<81", "ftfy", "regex",
]  # fmt: skip
WITHOUT_DEPENDENCIES = [
    "image-reward==1.5", "hpsv2==1.2.0", "timm==0.6.13", "torchvision==0.15.2", "clip-anytorch==2.6.0",
    "fairscale==0.4.13",
]  # fmt: skip


def build_environment(folder):
    """A virtual environment with the original packages; they pin what excludes each other, so without dependencies."""
    subprocess.run(["python3.11", "-m", "venv", folder], check=True)
    pip = [str(Path(folder) / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, TORCH, *REQUIREMENTS], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *WITHOUT_DEPENDENCIES], check=True)


class GivenTokens:
    """A tokenizer that returns tokens which were saved: (B, L) ids and attention mask, by the number of prompts."""

    def __init__(self, *tokens):
        self.tokens = {len(t["input_ids"]): t for t in tokens}

    def __call__(self, prompts, return_tensors=None, **_):
        tokens = self.tokens[len(prompts)]
        if return_tensors is None:
            return {"input_ids": [row[row != 0].tolist() for row in tokens["input_ids"]]}
        return BatchEncoding(tokens)


def saved_tokens(outputs):
    """The tokens in `outputs.safetensors`, for the pictures and for the PIL pictures."""
    return [{k: outputs[prefix + k].clone() for k in ("input_ids", "attention_mask")} for prefix in ("", "pil_")]


def tiny_image_reward(state, tokenizer):
    """Our ImageReward of the tiny size."""
    size = CONFIGS["image_reward_tiny"]
    width, layers, heads = size["vision"]
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=size["image"], patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    text_width, layers, heads = size["text"]
    text = BlipTextConfig(
        hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=64, encoder_hidden_size=width, layer_norm_eps=1e-12, is_decoder=True,
    )  # fmt: skip
    return ImageReward.from_state(state, tokenizer, "the oracle's state", vision, text)


def tiny_hpsv2(state, tokenizer):
    """Our HPSv2 of the tiny size."""
    size = CONFIGS["hpsv2_tiny"]
    (width, layers, heads), (text_width, text_layers, text_heads) = size["vision"], size["text"]
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": size["image"], "patch_size": size["patch"], "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu",
        "eos_token_id": 49407,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return HPSv2.from_state("hpsv2", state, tokenizer, "the oracle's state", config)


def load(case, folder):
    """Our reward, from the oracle's checkpoint and tokenizer files."""
    if case == "image_reward_full":
        return ImageReward.from_pretrained(folder / "checkpoint.pt")
    state = read(folder / "checkpoint.pt")
    if case == "image_reward_tiny":
        return tiny_image_reward(state, load_tokenizer(BertTokenizer, "image_reward", folder, "none"))
    return tiny_hpsv2(state["state_dict"], load_tokenizer(CLIPTokenizer, "hpsv2", folder, "none"))


def load_saved(case, folder):
    """The same without the checkpoint: the weights drawn again, the tokens as they were saved."""
    shapes = json.loads((folder / "shapes.json").read_text())
    state = random_state({k: tuple(v) for k, v in shapes.items()})
    tokenizer = GivenTokens(*saved_tokens(load_file(folder / "outputs.safetensors")))
    return {"image_reward_tiny": tiny_image_reward, "hpsv2_tiny": tiny_hpsv2}[case](state, tokenizer)


def differences(case, reward, outputs):
    """Largest absolute difference of score, gradient and end-to-end score, in units of the original package.

    The hpsv2 package returns the cosine, ours 100 times that.
    """
    unit, size = (100 if case.startswith("hpsv2") else 1), CONFIGS[case]["image"]
    n = len(outputs["score"])
    pixels = pictures(n, size, size).requires_grad_()
    r = reward(pixels, PROMPTS[-n:]) / unit
    (gradient,) = torch.autograd.grad(r.sum(), pixels)
    images = [bytes_of(*s).permute(2, 0, 1)[None] / 255 for s in SIZES]
    with torch.no_grad():
        end_to_end = torch.cat([reward(image, [PROMPTS[-1]]) for image in images]) / unit
    ours = {"score": r.detach(), "gradient": gradient, "end_to_end": end_to_end}
    return {k: (v - outputs[k]).abs().max().item() for k, v in ours.items()}


def run_oracle(python, case, folder):
    """Writes the checkpoint and the outputs of the original package in `folder`."""
    subprocess.run([python, str(ORACLE), case, str(folder)], check=True, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", required=True, help="folder of the isolated environment")
    parser.add_argument("--cases", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--save", help="keep the outputs of the tiny cases in this folder")
    args = parser.parse_args()
    python = Path(args.environment) / "bin" / "python"
    if not python.exists():
        build_environment(args.environment)
    good = True
    print("| case | score | pixel gradient | from a PIL picture | spread of the PIL scores | seconds |")
    print("|---|---|---|---|---|---|")
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            run_oracle(str(python), case, folder)
            outputs, reward = load_file(folder / "outputs.safetensors"), load(case, folder)
            start = time.time()
            found = differences(case, reward, outputs)
            cells = " | ".join(f"{found[k]:.1e}" for k in BARS)
            spread = (outputs["end_to_end"].max() - outputs["end_to_end"].min()).item()
            print(f"| {case} | {cells} | {spread:.2f} | {time.time() - start:.1f} |", flush=True)
            compared = [k for k in BARS if k != "end_to_end" or CONFIGS[case]["image"] == 224]
            good &= all(found[k] <= BARS[k] for k in compared)
            if args.save and case.endswith("tiny"):
                kept = Path(args.save) / case
                kept.mkdir(parents=True, exist_ok=True)
                for name in ("outputs.safetensors", "shapes.json"):
                    shutil.copyfile(folder / name, kept / name)
    sys.exit(not good)


if __name__ == "__main__":
    main()
