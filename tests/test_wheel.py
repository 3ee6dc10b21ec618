"""A built wheel is whole: its scripts run from anywhere, with the pocket and the card's template."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_holds_what_the_scripts_need_and_no_more(tmp_path):
    """Needs a package index, for the build's own environment."""
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert not [name for name in ("tests", "benchmarks", "experiments") if (site / name).exists()]
    template = (site / "model_card_template.md").read_text()
    assert template == (ROOT / "model_card_template.md").read_text()
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = "--max_train_steps 1 --ta_warmup_steps 0 --num_eval_prompts 2 --num_eval_images 2 --validation_steps 0"
    words = [*options.split(), "--num_validation_prompts", "1", "--report_to", "none"]
    for command in (
        ["-m", "train_diff_instruct_pp", *words],
        ["-m", "evaluate_one_step", "--help"],
        ["-m", "export_for_apps", "diff-instruct-pp", "files"],
    ):
        subprocess.run([sys.executable, *command], cwd=elsewhere, env=env, check=True, capture_output=True)
    assert (elsewhere / "diff-instruct-pp" / "samples.png").is_file() and any((elsewhere / "files").iterdir())
