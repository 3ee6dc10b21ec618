"""A judge of the pocket world that gives numbers alone: are background and colour what the prompt says?"""

from pocket.truth import backgrounds, colours
from pocket.world import BACKGROUNDS, HUES, parse


def looks(pixels, prompts):
    """The share of background and, where one is said, colour that is right, a list of B, from pixels (B, 3, H, W)
    alone. The noun has no say: no network judges. A prompt that is no sentence of this world gets 0."""
    names, hues = list(BACKGROUNDS), [*HUES, None]
    seen = zip(backgrounds(pixels).tolist(), colours(pixels).tolist())
    return [share(parse(prompt), names[b], hues[h]) for prompt, (b, h) in zip(prompts, seen)]


def share(meaning, background, colour):
    """Of what a `Meaning` says of them, how much is right."""
    if meaning is None:
        return 0.0
    right = [meaning.background == background]
    right += [] if meaning.colour is None else [meaning.colour == colour]
    return sum(right) / len(right)
