"""The pocket world: icons of nouns in seven colours on nine backgrounds, with captions that are true.

What a picture shows is known exactly, because vectors are recoloured (`pocket.icons`) and backgrounds composed:
`pocket.truth` measures it back from pixels.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


RESOLUTION = 48
MARGIN = 3  # pixels of plain background on every side

HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 125, "blue": 215, "purple": 272, "pink": 328}  # degrees

BACKGROUNDS = {  # far from each other, and light enough for icons to stand out
    "white": (255, 255, 255),
    "red": (228, 72, 76),
    "orange": (255, 160, 64),
    "yellow": (255, 230, 90),
    "green": (120, 212, 110),
    "blue": (104, 176, 255),
    "purple": (160, 116, 232),
    "pink": (255, 176, 212),
    "black": (28, 28, 36),
}

PLURAL = {"fries", "grapes", "jeans"}  # without an article
NOUNS = json.loads((Path(__file__).parent / "nouns.json").read_text())  # caption's noun: icon's name in the sets


def compose(rgba, background):
    """Pixels in [0, 1], (B, 3, H, W), of uint8 icons (B, 4, H, W) on backgrounds (B,), indices into BACKGROUNDS."""
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    colour, alpha = rgba[:, :3].float() / 255, rgba[:, 3:].float() / 255
    return alpha * colour + (1 - alpha) * palette[background][:, :, None, None]


def caption(noun, colour=None, background="white"):
    """What a picture shows: "a purple fish on a yellow background", "an apple" (in its own colours, on white)."""
    text = f"{colour} {noun}" if colour else noun
    if noun not in PLURAL:
        text = ("an " if text[0] in "aeiou" else "a ") + text
    if background == "white":
        return text
    return f"{text} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


@dataclass(frozen=True)
class Meaning:
    """What a caption says: noun, colour (None: its own) and background."""

    noun: str
    colour: str | None
    background: str


def parse(text):
    """The `Meaning` of a caption, or None if this world has no such sentence."""
    match = re.fullmatch(r"(?:an? )?(?P<what>.+?)(?: on an? (?P<where>\w+) background)?", text.strip().lower())
    if match is None:
        return None
    first, _, rest = match["what"].partition(" ")
    colour, noun = (first, rest) if first in HUES and rest in NOUNS else (None, match["what"])
    background = match["where"] or "white"
    if noun not in NOUNS or background not in BACKGROUNDS:
        return None
    return Meaning(noun, colour, background)


@dataclass
class World:
    """All pictures: N icons, and the M (icon, background) pairs in which the icon stands out.

    Args:
        icons: (N, 4, 48, 48) uint8.
        entries: for each icon a dictionary with noun, colour (or None) and set.
        pairs: (M, 2) int64, icon and background.
        heldout: (M,) bool, pairs whose (noun, colour) or (noun, background) nothing is trained on.
    """

    icons: torch.Tensor
    entries: list
    pairs: torch.Tensor
    heldout: torch.Tensor

    def pixels(self, index):
        """Pixels in [0, 1], (B, 3, 48, 48), of pairs (B,)."""
        icon, background = self.pairs[index].T
        return compose(self.icons[icon], background)

    def meaning(self, index):
        """The `Meaning` of one pair."""
        icon, background = self.pairs[index].tolist()
        return Meaning(self.entries[icon]["noun"], self.entries[icon]["colour"], list(BACKGROUNDS)[background])

    def captions(self):
        """The caption of every pair, a list of M."""
        meanings = (self.meaning(i) for i in range(len(self.pairs)))
        return [caption(m.noun, m.colour, m.background) for m in meanings]

    def captions_of(self, heldout):
        """The different captions of pairs held out, or of those that are not, sorted."""
        return sorted({c for c, new in zip(self.captions(), self.heldout.tolist()) if new == heldout})


def load(work_dir):
    """The `World` that `icons.prepare` wrote."""
    tensors = load_file(Path(work_dir) / "world.safetensors")
    content = json.loads((Path(work_dir) / "world.json").read_text())
    entries, pairs, heldout = content["entries"], [], []
    new = {kind: {tuple(pair) for pair in left} for kind, left in content["heldout"].items()}
    for i, (entry, row) in enumerate(zip(entries, tensors["visible"].bool().tolist())):
        for b, (background, clear) in enumerate(zip(BACKGROUNDS, row)):
            if clear and background != entry["colour"]:
                noun = entry["noun"]
                pairs.append((i, b))
                heldout.append((noun, entry["colour"]) in new["colour"] or (noun, background) in new["background"])
    return World(tensors["icons"], entries, torch.tensor(pairs), torch.tensor(heldout))
