"""A transformer's weights by the names of its original layout, which ComfyUI and stable-diffusion.cpp read.

A family's `apps` says how the names go, one layer a line: `ORIGINAL = LAYER LAYER ...`, layers by their names in
diffusers. A line `ORIGINAL = LAYERS:` begins the names that stand indented below it, `*` for a block's number. Several
layers are stacked in this order (query, key, value in one). A `~` before a layer that makes a shift and a scale swaps
the two, which diffusers has the other way round; a `|` joins rows to one. A layer that no line names keeps its name.
"""

import inspect
import re

import torch


class Stacked:
    """A weight of the original layout; calling it makes the tensor.

    Args:
        weights: tensors by diffusers' names, stacked along dimension 0.
        swapped: whether its two halves change places.
        flat: whether its rows are joined to one.
    """

    def __init__(self, weights, swapped=False, flat=False):
        self.weights, self.swapped, self.flat = weights, swapped, flat
        first, *others = weights.values()
        self.shape = torch.Size([first.shape[0] + sum(len(w) for w in others), *first.shape[1:]])
        if flat:
            self.shape = torch.Size([first.numel()])

    def __call__(self):
        stacked = (
            torch.cat(list(self.weights.values())) if len(self.weights) > 1 else next(iter(self.weights.values()))
        )
        stacked = torch.cat(stacked.chunk(2)[::-1]) if self.swapped else stacked
        return stacked.flatten() if self.flat else stacked


def read_table(text):
    """[(pattern of a diffusers name, original name, place in the stack, "~", "|" or nothing)] of a table."""
    rows, before = [], ("", "")
    for line in inspect.cleandoc(text).splitlines():
        if line.endswith(":"):
            before = tuple(f"{part.strip()}." for part in line[:-1].split("="))
            continue
        prefix, under = before if line.startswith(" ") else ("", "")
        original, layers = (part.split() for part in line.split("="))
        for place, layer in enumerate(layers):
            pattern = re.escape(under + layer.lstrip("~|")).replace(r"\*", r"(\d+)")
            rows.append((re.compile(pattern), prefix + original[0], place, layer[0] if layer[0] in "~|" else ""))
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
        target = (key, 0, "")
        for pattern, original, place, mark in rows:
            for name, end in ((key, ""), (layer, f".{kind}")):
                found = pattern.fullmatch(name)
                if found:
                    numbers = iter(found.groups())
                    name = re.sub(r"\*", lambda _: next(numbers), original)
                    target = (name + end, place, mark)
        original, place, mark = target
        places.setdefault(original, []).append((place, key, weight, mark))
    layout = {}
    for original, parts in places.items():
        parts.sort(key=lambda part: part[0])
        _, key, _, mark = parts[0]
        swapped = mark == "~" and has_two_halves(network, key.rpartition(".")[0])
        layout[original] = Stacked({key: weight for _, key, weight, _ in parts}, swapped, mark == "|")
    return layout
