"""Speed and memory: what a run costs."""

import sys
from pathlib import Path

from diff_instruct.mistake import Mistake


ARCHITECTURES = Path(__file__).parent / "architectures"
PUBLISHED = sorted(folder.parent.name for folder in ARCHITECTURES.glob("*/model_index.json"))


def run(main):
    """A script's `main`; a mistake ends it with one line."""
    try:
        main()
    except Mistake as error:
        sys.exit(f"error: {error}")
