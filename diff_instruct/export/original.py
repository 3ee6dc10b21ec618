"""A transformer's weights by the names of its original layout, which ComfyUI and stable-diffusion.cpp read.

A family's `apps` says how the names go, one layer a line: `ORIGINAL = LAYER LAYER ...`, layers by their names in
diffusers. A line `ORIGINAL = LAYERS:` begins the names that stand indented below it, `*` for a block's number. Several
layers are stacked in this order (query, key, value in one). A `~` before a layer that makes a shift and a scale swaps
the two, which diffusers has the other way round. A layer that no line names keeps its name.
"""

import inspect
import re

import torch


class Stacked:
    """A weight of the original layout; calling it makes the tensor.

    Args:
        weights: tensors by diffusers' names, stacked along dimension 0.
        swapped: whether its two halves change places.
    """

    def __init__(self, weights, swapped):
        self.weights, self.swapped = weights, swapped
        first, *others = weights.values()
        self.shape = torch.Size([first.shape[0] + sum(len(w) for w in others), *first.shape[1:]])

    def __call__(self):
        stacked = (
            torch.cat(list(self.weights.values())) if len(self.weights) > 1 else next(iter(self.weights.values()))
        )
        return torch.cat(stacked.chunk(2)[::-1]) if self.swapped else stacked


def read_table(text):
    """[(pattern of a diffusers name, original name, place in the stack, swapped)] of a table."""
    rows, before = [], ("", "")
    for line in inspect.cleandoc(text).splitlines():
        if line.endswith(":"):
            before = tuple(f"{part.strip()}." for part in line[:-1].split("="))
            continue
        prefix, under = before if line.startswith(" ") else ("", "")
        original, layers = (part.split() for part in line.split("="))
        for place, layer in enumerate(layers):
            pattern = re.escape(under + layer.removeprefix("~")).replace(r"\*", r"(\d+)")
            rows.append((re.compile(pattern), prefix + original[0], place, layer.startswith("~")))
    return rows


def is_swapped(weight, network, layer):
    """Whether a layer makes one shift and one scale; a modulation of six parts has them in one order everywhere."""
    module = network.get_submodule(layer)
    return module.out_features == 2 * module.in_features


def original_layout(network, table):
    """{original name: [`Stacked`]} of every weight of a network, in the order of the network's own."""
    rows, places = read_table(table or ""), {}
    for key, weight in network.state_dict().items():
        layer, _, kind = key.rpartition(".")
        target = (key, 0, False)
        for pattern, original, place, swapped in rows:
            for name, end in ((key, ""), (layer, f".{kind}")):
                found = pattern.fullmatch(name)
                if found:
                    numbers = iter(found.groups())
                    name = re.sub(r"\*", lambda _: next(numbers), original)
                    target = (name + end, place, swapped and is_swapped(weight, network, layer))
        original, place, swapped = target
        places.setdefault(original, []).append((place, key, weight, swapped))
    layout = {}
    for original, parts in places.items():
        parts.sort(key=lambda part: part[0])
        layout[original] = Stacked({key: weight for _, key, weight, _ in parts}, parts[0][3])
    return layout
