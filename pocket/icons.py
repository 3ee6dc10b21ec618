"""Icons from npm packages to pictures: SVG recoloured exactly, rendered, and written for `pocket.world` to load.

Two sets of icons, as packaged by iconify (see `SETS`), read at build time only; nothing of them is committed. Both are
flat: shading and outlines would cost a small autoencoder the detail that tells shapes apart.
"""

import colorsys
import io
import json
import random
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pocket.world import BACKGROUNDS, HUES, MARGIN, NOUNS, RESOLUTION


SETS = {  # npm package: version, licence
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "twemoji": ("1.2.5", "CC BY 4.0"),
}


def with_hue(colour, hue):
    """A fill "#rrggbb" in another hue (degrees): lightness stays, saturation at least 0.6.

    Greys (saturation < 0.25), near black and near white (lightness outside 0.12 .. 0.95) stay as they are.
    """
    digits = colour[1:]
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    r, g, b = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    _, lightness, saturation = colorsys.rgb_to_hls(r, g, b)
    if saturation < 0.25 or not 0.12 <= lightness <= 0.95:
        return colour
    rgb = colorsys.hls_to_rgb(hue / 360, lightness, max(saturation, 0.6))
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)


def recolour(body, hue):
    """The SVG with the hue (degrees) of every colour replaced, see `with_hue`."""
    return re.sub(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", lambda m: with_hue(m.group(), hue), body)


def render(body, size):
    """RGBA uint8 (RESOLUTION, RESOLUTION, 4) of an SVG body whose view box is `size` units wide, within the margin."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="512" height="512">{body}</svg>'
    import resvg_py  # whoever only reads a name of this module needs no package for drawing

    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())  # sets leave different margins
    inner = RESOLUTION - 2 * MARGIN
    scale = inner / max(image.size)
    image = image.resize(tuple(max(1, round(scale * side)) for side in image.size), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (RESOLUTION, RESOLUTION))
    canvas.paste(image, tuple((RESOLUTION - side) // 2 for side in image.size))
    return np.array(canvas)


def visible(rgba, least=0.6, distance=0.3):
    """(N, 9) bool: at least that share of an icon's pixels is that far from the background (sRGB, 0 .. √3)."""
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    shares = []
    for icon in rgba.float() / 255:
        opaque = icon[:3, icon[3] > 0.5].T
        shares.append((torch.cdist(opaque, palette) > distance).float().mean(0))
    return torch.stack(shares) >= least


def icon_sets(work_dir):
    """{set: {icon's name: (SVG body, units of the view box)}}; downloads the npm packages once."""
    result = {}
    for name, (version, _) in SETS.items():
        archive = Path(work_dir) / f"iconify-json-{name}-{version}.tgz"
        if not archive.exists():
            package = f"@iconify-json/{name}@{version}"
            subprocess.run(["npm", "pack", package], cwd=work_dir, check=True, capture_output=True)
        with tarfile.open(archive) as tar:
            content = json.load(tar.extractfile("package/icons.json"))
        icons, size = content["icons"], content["width"]
        aliases = {a: icons[entry["parent"]] for a, entry in content.get("aliases", {}).items()}
        result[name] = {icon: (entry["body"], size) for icon, entry in {**aliases, **icons}.items()}
    return result


def changed_share(icon, recoloured):
    """Share of the opaque pixels of an icon that recolouring changes."""
    opaque = icon[..., 3] > 127
    return (np.abs(icon.astype(int) - recoloured.astype(int)).max(-1) > 24)[opaque].mean()


def hold_out(coloured_nouns, nouns, share=0.1, seed=0):
    """A tenth of the (noun, colour) and of the (noun, background) pairs; every noun keeps most of its own."""
    rng = random.Random(seed)
    colours = sorted((n, c) for n in coloured_nouns for c in HUES)
    backgrounds = sorted((n, b) for n in nouns for b in BACKGROUNDS if b != "white")
    result = {}
    for kind, pairs in (("colour", colours), ("background", backgrounds)):
        rng.shuffle(pairs)
        left, wanted, taken = [], round(share * len(pairs)), {}
        for noun, value in pairs:
            if len(left) < wanted and taken.get(noun, 0) < 2:
                left.append((noun, value))
                taken[noun] = taken.get(noun, 0) + 1
        result[kind] = sorted(left)
    return result


def prepare(work_dir):
    """Write `world.safetensors` (`icons`, N RGBA pictures, uint8) and `world.json` (what each shows, what is new).

    An icon counts as colourable where recolouring changes more than 40% of its opaque pixels.
    """
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    if (work_dir / "world.json").exists():
        return
    pictures, entries = [], []
    for set_name, icons in icon_sets(work_dir).items():
        for noun, icon in NOUNS.items():
            body, size = icons[icon]
            own = render(body, size)
            pictures.append(own)
            entries.append({"noun": noun, "colour": None, "set": set_name})
            if changed_share(own, render(recolour(body, 180), size)) > 0.4:
                for colour, hue in HUES.items():
                    pictures.append(render(recolour(body, hue), size))
                    entries.append({"noun": noun, "colour": colour, "set": set_name})
    rgba = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    heldout = hold_out({e["noun"] for e in entries if e["colour"]}, NOUNS)
    save_file({"icons": rgba, "visible": visible(rgba).to(torch.uint8)}, work_dir / "world.safetensors")
    (work_dir / "world.json").write_text(json.dumps({"entries": entries, "heldout": heldout}, indent=1))
