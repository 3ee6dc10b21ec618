"""What an evaluation keeps on disk while it runs: its settings, and a file for each batch that is finished."""

import json
import re
from pathlib import Path

from diff_instruct.files import write_text
from diff_instruct.mistake import Mistake


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def fingerprint(path):
    """[bytes, newest change] of a local file, or of the weights in a folder, to notice that it is another one.

    None if it is not local. Other files in a folder do not count: a model's card may be written anew.
    """
    path = Path(path)
    if not path.exists():
        return None
    files = [f for f in path.rglob("*") if f.suffix in WEIGHTS] if path.is_dir() else [path]
    stats = [f.stat() for f in files]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def remember(folder, settings, models):
    """Keep `settings.json`; once a batch is finished, later starts in the same folder must agree. New models may join.

    Args:
        settings (`dict`): what figures depend on, the same for all models.
        models (`dict`): what is known of each model, by name.

    Raises:
        Mistake: if a setting or a known model has changed since.
    """
    file = Path(folder) / "settings.json"
    if file.is_file() and not re.match(r'\{\s*"settings"', file.read_text()):
        raise Mistake(f"{folder} holds a settings.json that no evaluation wrote: take another --output_dir")
    now, known = json.loads(json.dumps(settings)), {}  # tuples as lists, as they come back
    if file.is_file() and any(Path(folder).glob("scores/*/*.json")):
        before = json.loads(file.read_text())
        known = before["models"]
        changed = [key for key in now if now[key] != before["settings"].get(key)]
        changed += [f"model {name}" for name in models if name in known and models[name] != known[name]]
        if changed:
            raise Mistake(
                f"{folder} holds an evaluation with other settings ({', '.join(changed)}): take another --output_dir, "
                "or delete it"
            )
    write_text(file, json.dumps({"settings": now, "models": {**known, **models}}, indent=2) + "\n")


class Batches:
    """The batches of one model: batch i is `scores/<name>/<i>.json`, written when it is finished.

    Batches hold the same prompts whoever computes them, so that a continued run, or one with more processes, gives
    the same figures.
    """

    def __init__(self, folder, name, number):
        self.files = [Path(folder) / "scores" / name / f"{i:05d}.json" for i in range(number)]
        self.files[0].parent.mkdir(parents=True, exist_ok=True)

    def missing(self):
        """Numbers of the batches that are not finished."""
        return [i for i, file in enumerate(self.files) if not file.is_file()]

    def write(self, i, batch):
        write_text(self.files[i], json.dumps(batch) + "\n")

    def read(self):
        """All batches, in order."""
        return [json.loads(file.read_text()) for file in self.files]
