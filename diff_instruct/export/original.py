"""A transformer's weights by the names of its original layout, which ComfyUI and stable-diffusion.cpp read.

A family's `apps` says how the names go, one layer a line: `ORIGINAL = LAYER LAYER ...`, layers by their names in
diffusers. A line `ORIGINAL = LAYERS:` begins the names that stand indented below it, `*` for a block's number. Several
layers are stacked in this order (query, key, value in one); among several names on the left a layer's rows are divided
in equal parts. Of several lines that name a layer the last counts. A `~` before a layer that makes a shift and a scale
swaps the two, which diffusers has the other way round; a `|` joins rows to one. A layer that no line names keeps its
name.
"""

import inspect
import re
from typing import NamedTuple

import torch


class Stacked:
    """A weight of the original layout; calling it makes the tensor.

    Args:
        weights: tensors by diffusers' names, stacked along dimension 0.
        swapped: whether its two halves change places.
        flat: whether its rows are joined to one.
        part: (i, n) if it is the i-th of n equal parts of the rows.
    """

    def __init__(self, weights, swapped=False, flat=False, part=(0, 1)):
        self.weights, self.swapped, self.flat, self.part = weights, swapped, flat, part
        first, *others = weights.values()
        rows = first.shape[0] + sum(len(w) for w in others)
        self.shape = torch.Size([rows // part[1], *first.shape[1:]])
        if flat:
            self.shape = torch.Size([first.numel()])

    def __call__(self):
        return self.made_of(self.weights)

    def made_of(self, weights):
        """As the weight itself, of other tensors by the same names, which may have other columns."""
        stacked = torch.cat(list(weights.values())) if len(weights) > 1 else next(iter(weights.values()))
        stacked = torch.cat(stacked.chunk(2)[::-1]) if self.swapped else stacked
        i, n = self.part
        stacked = stacked.chunk(n)[i] if n > 1 else stacked
        return stacked.flatten() if self.flat else stacked


class Row(NamedTuple):
    """A layer or weight of diffusers in a table.

    Args:
        pattern: of its name; groups are the blocks' numbers.
        original: its name in the original layout, `*` for a number.
        place: in the stack.
        mark: "~", "|" or nothing.
        part: as [`Stacked`] has it.
    """

    pattern: re.Pattern
    original: str
    place: int
    mark: str
    part: tuple


def read_table(text):
    """The [`Row`]s of a table."""
    rows, before = [], ("", "")
    for line in filter(None, inspect.cleandoc(text).splitlines()):
        if line.endswith(":"):
            before = tuple(f"{part.strip()}." for part in line[:-1].split("="))
            continue
        prefix, under = before if line.startswith(" ") else ("", "")
        originals, layers = (part.split() for part in line.split("="))
        for place, layer in enumerate(layers):
            pattern = re.compile(re.escape(under + layer.lstrip("~|")).replace(r"\*", r"(\d+)"))
            mark = layer[0] if layer[0] in "~|" else ""
            for i, original in enumerate(originals):
                rows.append(Row(pattern, prefix + original, place, mark, (i, len(originals))))
    return rows


def has_two_halves(network, layer):
    """Whether a layer makes one shift and one scale; a modulation of six parts has them in one order everywhere."""
    module = network.get_submodule(layer)
    return module.out_features == 2 * module.in_features


def original_layout(network, table):
    """{original name: [`Stacked`]} of every weight of a network, in the order of the network's own."""
    rows, places = read_table(table or ""), {}
    for key, weight in network.state_dict().items():
        layer, _, kind = key.rpartition(".")
        targets = {}
        for row in rows:
            for name, end in ((key, ""), (layer, f".{kind}")):
                found = row.pattern.fullmatch(name)
                if found:
                    numbers = iter(found.groups())
                    targets = targets if row.part[0] else {}
                    targets[row.part] = (re.sub(r"\*", lambda _: next(numbers), row.original) + end, row)
        for original, row in targets.values() or [(key, Row(None, key, 0, "", (0, 1)))]:
            places.setdefault(original, []).append((row, key, weight))
    layout = {}
    for original, parts in places.items():
        parts.sort(key=lambda part: part[0].place)
        row, key, _ = parts[0]
        swapped = row.mark == "~" and has_two_halves(network, key.rpartition(".")[0])
        weights = {key: weight for _, key, weight in parts}
        layout[original] = Stacked(weights, swapped, row.mark == "|", row.part)
    return layout
