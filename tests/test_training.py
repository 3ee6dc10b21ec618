import json

from diff_instruct.arguments import parse_args
from train_diff_instruct_pp import main


def test_smoke(tiny_args, tmp_path):
    main(parse_args(tiny_args))
    out = tmp_path / "out"
    for name in ("model_index.json", "README.md", "samples.png", "curves.png", "pipeline_one_step.py"):
        assert (out / name).stat().st_size > 0
    summary = json.loads((out / "training_summary.json").read_text())
    assert summary["n_prompts"] == 3 and summary["n_images"] == 6
