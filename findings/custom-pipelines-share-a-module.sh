#!/usr/bin/env bash
# A second custom pipeline takes over the helpers of the first, if their files have the same name.
#
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0 (Python 3.11).
#
# Two exported folders, each with its own `pipeline.py` that its model_index.json names: two versions of one model,
# say, to be compared in one process. One expects each loaded pipeline to keep running its own file. diffusers
# executes the second file inside the module object of the first (diffusers_modules.local.pipeline), so that every
# function and constant that the first pipeline's methods look up is the second's from then on: the pipeline that was
# loaded first changes its results when the other is loaded.
#
# Seen:
#   first folder loaded:   first pipeline gives 1.0
#   second folder loaded:  first pipeline gives 2.0, second 2.0

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0

HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$folder/modules" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pathlib
import sys

from diffusers import DDPMScheduler, DiffusionPipeline

CODE = """
from diffusers import DiffusionPipeline

GAIN = {gain}


def scaled(x):
    return GAIN * x


class ScaledPipeline(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, x):
        return scaled(x)
"""


def loaded(folder, gain):
    """The pipeline of a folder whose own file multiplies by `gain`."""
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "pipeline.py").write_text(CODE.format(gain=gain))
    index = {"_class_name": ["pipeline", "ScaledPipeline"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


folder = pathlib.Path(sys.argv[1])
first = loaded(folder / "first", 1.0)
before = first(1.0)
print(f"first folder loaded:   first pipeline gives {before}")
second = loaded(folder / "second", 2.0)
after, other = first(1.0), second(1.0)
print(f"second folder loaded:  first pipeline gives {after}, second {other}")
if (before, after, other) != (1.0, 2.0, 2.0):
    sys.exit("changed: the first pipeline keeps its own helpers")
PYTHON
