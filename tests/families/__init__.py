"""A tiny pipeline of each family, one file each, named as the family's: real classes, random weights.

Each module has `PIPELINES`, name to function that makes one: a stock pipeline's class name, or a variant's own name;
and `SIDE`, if its pictures are not of 32×32 pixels.
"""

import importlib
import pkgutil

import torch

from diff_instruct.families import FAMILIES
from tests.families.parts import SIDE


MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
MODULES = [module for module in MODULES if hasattr(module, "PIPELINES")]
BUILD = {name: build for module in MODULES for name, build in module.PIPELINES.items()}
SIDES = {name: getattr(module, "SIDE", SIDE) for module in MODULES for name in module.PIPELINES}
BY_MODULE = {family.__module__.rpartition(".")[2]: family for family in FAMILIES.values()}
FAMILY = {name: BY_MODULE[module.__name__.rpartition(".")[2]] for module in MODULES for name in module.PIPELINES}
FLOW = [name for name in BUILD if FAMILY[name].flow]


def save(name, folder, seed=0):
    """One of `BUILD`, saved in a folder; returns the folder."""
    torch.manual_seed(seed)
    BUILD[name]().save_pretrained(folder)
    return str(folder)
