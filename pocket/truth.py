"""What a picture of the pocket world shows, measured: background and colour from pixels, the noun by a scorer.

No network has a say in background and colour. The noun is the one that a scorer which nothing is trained on ranks
first among all nouns of the caption's own colour and background, so that neither helps it.
"""

import torch

from pocket.world import BACKGROUNDS, HUES, NOUNS, caption, parse


def palette():
    """The backgrounds' colours, (9, 3) in [0, 1]."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def border(pixels, width=2):
    """Colours of the outermost pixels, (B, n, 3), of pixels (B, 3, H, W)."""
    edge = torch.ones(pixels.shape[-2:], dtype=torch.bool, device=pixels.device)
    edge[width:-width, width:-width] = False
    return pixels[:, :, edge].transpose(1, 2)


def backgrounds(pixels):
    """Indices into BACKGROUNDS, (B,), of pixels (B, 3, H, W) in [0, 1]: the nearest to the border's median colour."""
    middle = border(pixels).median(dim=1).values
    return torch.cdist(middle, palette().to(middle)).argmin(dim=1)


def hue_and_chroma(pixels):
    """Hue in degrees and chroma (largest channel minus smallest), (B, H, W) each, of pixels (B, 3, H, W) in [0, 1]."""
    high, which = pixels.max(dim=1)
    chroma = high - pixels.min(dim=1).values
    r, g, b = pixels.unbind(1)
    sector = torch.stack([(g - b), (b - r), (r - g)]) / chroma.clamp(min=1e-6)
    return (60 * (sector.gather(0, which[None])[0] + 2 * which)) % 360, chroma


def colours(pixels, far=0.25, least_chroma=0.15):
    """Indices into HUES, (B,), of pixels (B, 3, H, W) in [0, 1]: the hue with most chroma in what is not background.

    Not background is what is further than `far` (sRGB, 0 .. √3) from the border's median colour; a pixel counts for
    the hue that is nearest to its own. −1 where nothing has a colour.
    """
    ground = border(pixels).median(dim=1).values[:, :, None, None]
    hue, chroma = hue_and_chroma(pixels)
    weight = chroma * ((pixels - ground).norm(dim=1) > far) * (chroma > least_chroma)
    turn = (hue[:, None] - torch.tensor(list(HUES.values()), device=hue.device).view(1, -1, 1, 1)).abs()
    nearest = torch.minimum(turn, 360 - turn).argmin(dim=1)
    votes = torch.stack([(weight * (nearest == k)).sum(dim=(1, 2)) for k in range(len(HUES))], dim=1)
    return torch.where(votes.sum(dim=1) > 0, votes.argmax(dim=1), -1)


@torch.no_grad()
def nouns(scorer, pixels, meanings, texts=None):
    """Indices into NOUNS, (B,): which of them the scorer ranks first for each of B pictures and `Meaning`s.

    `texts` keeps the features of all nouns in each colour and on each background for later calls.
    """
    features, ranked, texts = scorer.image_features(pixels), [], {} if texts is None else texts
    for feature, m in zip(features, meanings):
        key = (m.colour, m.background)
        if key not in texts:
            texts[key] = scorer.text_features([caption(noun, *key) for noun in NOUNS])
        ranked.append((texts[key].to(feature) @ feature).argmax())
    return torch.stack(ranked)


def measure(pixels, meanings, scorer, texts=None):
    """Whether B pictures, pixels (B, 3, H, W) in [0, 1], show what their `Meaning`s say; `texts` as in `nouns`.

    Returns:
        `dict` of float (B,) tensors, 1 or 0: `background`, `colour` (NaN where none is said) and `noun`.
    """
    shown = {
        "background": [list(BACKGROUNDS)[k] for k in backgrounds(pixels)],
        "colour": [[*HUES, None][k] for k in colours(pixels)],
        "noun": [list(NOUNS)[k] for k in nouns(scorer, pixels, meanings, texts)],
    }
    result = {}
    for what, values in shown.items():
        said = [getattr(m, what) for m in meanings]
        right = [float("nan") if s is None else float(s == v) for s, v in zip(said, values)]
        result[what] = torch.tensor(right, device=pixels.device)
    return result


def meanings_of(prompts):
    """The `Meaning` of each prompt; raises ValueError for one that is not a sentence of this world."""
    meanings = [parse(p) for p in prompts]
    if None in meanings:
        example = caption("fish", "purple", "yellow")
        raise ValueError(f"not a sentence of the pocket world, like `{example}`: `{prompts[meanings.index(None)]}`")
    return meanings
