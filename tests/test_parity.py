"""Our rewards against the original packages: against what they returned (tests/oracle), and, with -m oracle, against
the packages themselves (`tests/parity/reward_parity.py`; the environment in $REWARD_ORACLE_ENV is built if missing).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.parity.reward_inputs import CONFIGS, ORACLE, PROMPTS, SIZES, bytes_of
from tests.parity.reward_ours import BAR, bar, differences, load_saved


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("case", [case for case in CONFIGS if case.endswith("tiny")])
def test_scores_and_gradients_are_those_of_the_original_package(case):
    outputs = load_file(ORACLE / case / "outputs.safetensors")
    assert outputs["gradient"].abs().max() > 1e-3 and outputs["score"].std() > 1e-3  # there is something to compare
    found = differences(case, load_saved(case, ORACLE / case), outputs)
    assert all(found[k] <= bar(outputs[k]) for k in ("score", "gradient")), found


def test_another_number_of_heads_is_noticed():
    """The comparison can fail: transformers' default of 8 heads loads strictly and scores wrongly."""
    reward = load_saved("image_reward_tiny", ORACLE / "image_reward_tiny")
    for layer in reward.text.encoder.layer:
        layer.attention.self.num_attention_heads *= 2
        layer.attention.self.attention_head_size //= 2
    found = differences("image_reward_tiny", reward, load_file(ORACLE / "image_reward_tiny" / "outputs.safetensors"))
    assert found["score"] > 100 * BAR


@pytest.mark.parametrize(
    "name, unit, near",
    [
        ("image_reward", 1, 1e-2),
        ("pickscore", 1, 0.2),
        ("clip", 100, 1e-2),
        ("aesthetic", 1, 1e-2),
        ("hpsv3", 1, 1e-3),
    ],
)
def test_pictures_of_other_sizes_differ_by_pil_s_rounding_only(name, unit, near):
    """Resized by PIL itself they score the same; resized by us, near it: PIL rounds to 8 bits."""
    case = f"{name}_tiny"
    outputs, reward = load_file(ORACLE / case / "outputs.safetensors"), load_saved(case, ORACLE / case)
    for (height, width), expected in zip(SIZES, outputs["end_to_end"]):
        whole = bytes_of(height, width).permute(2, 0, 1)[None] / 255
        assert abs(reward(whole, [PROMPTS[-1]]) / unit - expected) <= near
        size = [int(CONFIGS[case]["image"] * side / min(height, width)) for side in (width, height)]
        if name == "hpsv3" and height != width:
            continue  # it would be resized a second time
        picture = np.array(Image.fromarray(bytes_of(height, width).numpy()).resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        assert abs(reward(pixels, [PROMPTS[-1]]) / unit - expected) <= bar(expected)


@pytest.mark.oracle
@pytest.mark.parametrize("case", CONFIGS)
def test_against_the_original_packages(case):
    environment = os.environ.get("REWARD_ORACLE_ENV", str(ROOT / ".oracle"))
    command = [sys.executable, str(ROOT / "tests" / "parity" / "reward_parity.py"), "--environment", environment]
    assert subprocess.run([*command, "--cases", case]).returncode == 0
