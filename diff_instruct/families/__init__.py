"""The families of models, one file each: this folder is their list.

Each file holds one subclass of `pipeline_one_step.Family`, both what travels with an export (conditioning, call,
decoding, grid) and what training, export and evaluation must know. docs/design.md shows how to add one.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

from diff_instruct.mistake import Mistake
from pipeline_one_step import Family, OneStepPipeline


OURS = ("diff_instruct", "pipeline_one_step")  # modules whose definitions stand in an export's own file


def self_contained(family):
    """The text of an export's `pipeline_one_step.py`: the core, and after it what the family's file defines; before
    that what those define that it builds on."""
    core, imports, definitions = OneStepPipeline.code, [], []
    for cls in reversed(family.__mro__[: family.__mro__.index(Family)]):
        text = Path(inspect.getsourcefile(cls)).read_text()
        docstring, *body = ast.parse(text).body
        nodes = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imports += [ast.unparse(n) for n in nodes if not getattr(n, "module", "").startswith(OURS)]
        definitions.append("\n".join(text.splitlines()[nodes[-1].end_lineno :]).strip())
    new = [line for line in dict.fromkeys(imports) if f"{line}\n" not in core]
    core = core.replace("\nimport ", "".join(f"\n{line}" for line in new) + "\nimport ", 1)
    return "\n\n\n".join([core.rstrip(), *definitions]) + "\n"


for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")


def defined(cls):
    """A family's class and all that build on it."""
    return [cls] + [family for subclass in cls.__subclasses__() for family in defined(subclass)]


FAMILIES = {family.name: family for family in defined(Family) if family.__module__.startswith(__name__)}
for family in FAMILIES.values():
    family.code = self_contained(family)


def find_family(name, path):
    """The family of a stock pipeline's class.

    Raises:
        Mistake: if it is not supported.
    """
    if name not in FAMILIES:
        raise Mistake(f"{path} is a {name}, which is not one of the {len(FAMILIES)} families of docs/families.md")
    return FAMILIES[name]
