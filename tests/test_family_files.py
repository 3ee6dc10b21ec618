"""A family is one file: what an export carries of it, and where its name may stand."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diff_instruct.families import FAMILIES
from diff_instruct.models.configs import ModelSource
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import read_models
from tests.families import BUILD, SIDES, save


ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red apple"


def export(name, folder):
    """An untrained export of a tiny reference; returns its pipeline."""
    models = read_models(ModelSource(save(name, folder / "reference")))
    pipe = load_generator(models, load_reference(models, torch.float32))
    pipe.save_pretrained(folder / name)
    return pipe


def load(folder):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def image(pipe, name):
    size = {"height": SIDES[name], "width": SIDES[name]}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **size).images


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_s_code_is_the_core_and_its_family(name):
    """It holds the definitions of the sources, word for word, imports nothing of ours, and defines its family."""
    family = FAMILIES[name]
    core = (ROOT / "pipeline_one_step.py").read_text()
    source = Path(sys.modules[family.__module__].__file__).read_text()
    definition = source[source.index(f"class {family.__name__}(") :]
    assert definition in family.code and family.code.count(f"class {family.__name__}(") == 1
    assert core[core.index("def device_of") :].rstrip() in family.code
    assert "diff_instruct." not in re.sub(r"`[^`]*`|import diff_instruct.families\"", "", family.code)
    scope = {"__name__": "alone", "__file__": ROOT / "pipeline_one_step.py"}
    exec(compile(family.code, name, "exec"), scope)
    assert scope["find_family"](name).__name__ == family.__name__


def test_exports_of_several_families_and_versions_live_in_one_process(tmp_path):
    """Each draws what it drew alone, by its own code, and saves its own code; one of version 0.1 among them."""
    names = ["StableDiffusion3Pipeline", "SanaSprintPipeline", "PixArtAlphaPipeline"]
    expected = {name: image(export(name, tmp_path / name), name) for name in names}
    folders = {name: tmp_path / name / name for name in names}
    old = tmp_path / "old"
    shutil.copytree(folders["PixArtAlphaPipeline"], old)
    shutil.copyfile(ROOT / "tests" / "data" / "pipeline_0_1.py", old / "pipeline_one_step.py")
    changed = tmp_path / "changed"  # another version: its helper is another one
    shutil.copytree(folders["StableDiffusion3Pipeline"], changed)
    code = (changed / "pipeline_one_step.py").read_text()
    assert "pixels = self.family.decode(self, x0).float() / 2 + 0.5" in code
    code = code.replace(
        "self.family.decode(self, x0).float() / 2 + 0.5", "halved(self.family.decode(self, x0).float())"
    )
    (changed / "pipeline_one_step.py").write_text(f"{code}\n\ndef halved(x):\n    return x / 4 + 0.5\n")
    cases = [*((name, folders[name]) for name in names), ("PixArtAlphaPipeline", old)]
    pipes = [load(folder) for _, folder in [*cases, ("StableDiffusion3Pipeline", changed)]]
    for (name, folder), pipe in zip(cases, pipes):
        assert torch.equal(image(pipe, name), expected[name])
        if folder != old:
            pipe.save_pretrained(tmp_path / "again" / folder.name)
            files = (f / "pipeline_one_step.py" for f in (folder, tmp_path / "again" / folder.name))
            assert len({file.read_text() for file in files}) == 1
    assert not torch.equal(image(pipes[-1], "StableDiffusion3Pipeline"), expected["StableDiffusion3Pipeline"])
    assert "halved" in pipes[-1].code and "halved" not in pipes[0].code


def test_the_core_can_be_imported_by_itself(tmp_path, monkeypatch):
    """Without the package; and a family that is not defined is one line that says what to do."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("diff_instruct", "pipeline_one_step")]:
        monkeypatch.setitem(sys.modules, name, None)  # so importing it fails
    shutil.copyfile(ROOT / "pipeline_one_step.py", tmp_path / "core.py")
    spec = importlib.util.spec_from_file_location("core", tmp_path / "core.py")
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    with pytest.raises(ValueError, match="no family FluxPipeline is defined here: load an export with DiffusionPip"):
        core.find_family("FluxPipeline")


def test_where_a_family_s_name_stands():
    """In its file and, of all else that is not a test, only in pages and in recipes: adding one touches no code."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    code = {f: (ROOT / f).read_text() for f in tracked if not f.startswith("tests/") and (ROOT / f).is_file()}
    for name, family in FAMILIES.items():
        own = Path(sys.modules[family.__module__].__file__).relative_to(ROOT).as_posix()
        places = {f for f, text in code.items() if re.search(rf"\b{name}\b", text)} - {own}
        places = {f for f in places if not f.startswith(("pocket/", "benchmarks/", "experiments/"))}
        assert not places, (name, places)
        assert f"`{name}`" in (ROOT / "docs" / "families.md").read_text(), name
        assert name in BUILD


def test_index_names_the_family(tmp_path):
    export("FluxPipeline", tmp_path)
    index = json.loads((tmp_path / "FluxPipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_one_step", "OneStepPipeline"] and index["family"] == "FluxPipeline"
