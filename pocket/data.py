"""Captioned emoji pictures from two npm packages: download, clean captions, split, augment.

Pictures: Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter, CC-BY 4.0), as packaged by `emoji-datasource-google`
and `emoji-datasource-twitter` 16.0.0. They are read at build time only; nothing of them is committed.
"""

import io
import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file


SETS = ("google", "twitter")
VERSION = "16.0.0"
CATEGORIES = {
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
}
RESOLUTION = 64
N_HELDOUT = 64


def clean(text):
    """Lower-case letters and single spaces only: "T-REX" becomes "t rex"."""
    return " ".join(re.findall(r"[a-z]+", text.lower().replace("’", "").replace("'", "")))


def wanted(entry):
    """Six pictorial categories and coloured shapes: flags, letters and 24 clock faces dilute a small model."""
    pictorial = entry["category"] in CATEGORIES or entry["subcategory"] == "geometric"
    drawn = all(entry[f"has_img_{s}"] for s in SETS)
    return pictorial and drawn and not entry["name"].startswith("CLOCK FACE")


def split_captions(names, synonyms, n_heldout=N_HELDOUT, seed=0):
    """Hold out captions whose every word is still seen in at least two other training captions."""
    uses = Counter(word for group in synonyms for word in set(" ".join(group).split()))
    order = list(range(len(names)))
    random.Random(seed).shuffle(order)
    heldout = set()
    for i in order:
        words = set(" ".join(synonyms[i]).split())
        in_name = set(names[i].split())
        if len(heldout) < n_heldout and len(in_name) > 1 and all(uses[w] > 2 for w in in_name):
            heldout.add(i)
            uses.subtract(words)
    return sorted(heldout)


def prepare(work_dir):
    """Download both packages and write `pictures.safetensors` (2N, 3, 64, 64) uint8 and `captions.json`.

    Picture 2i + k shows caption i in the style of SETS[k].
    """
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    if (work_dir / "captions.json").exists():
        return
    archives = []
    for name in SETS:
        package = f"emoji-datasource-{name}"
        archive = work_dir / f"{package}-{VERSION}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", f"{package}@{VERSION}"], cwd=work_dir, check=True, capture_output=True)
        with tarfile.open(archive) as tar:
            archives.append(
                {m.name: tar.extractfile(m).read() for m in tar if "/64/" in m.name or "emoji.json" in m.name}
            )
    entries = [e for e in json.loads(archives[0]["package/emoji.json"]) if wanted(e)]

    pictures = []
    for entry in entries:
        for name, files in zip(SETS, archives):
            image = Image.open(io.BytesIO(files[f"package/img/{name}/64/{entry['image']}"])).convert("RGBA")
            image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            pictures.append(torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1))

    names = [clean(e["name"]) for e in entries]
    synonyms = [sorted({clean(e["name"]), *map(clean, e["short_names"])} - {""}) for e in entries]
    heldout = split_captions(names, synonyms)
    heldout_names = {names[i] for i in heldout}
    captions = {
        "names": names,
        "synonyms": [[s for s in g if s == n or s not in heldout_names] for n, g in zip(names, synonyms)],
        "heldout": heldout,
    }
    save_file({"pictures": torch.stack(pictures)}, work_dir / "pictures.safetensors")
    (work_dir / "captions.json").write_text(json.dumps(captions, indent=1))


def load(work_dir):
    """Pictures as float32 in [-1, 1], (2N, 3, 64, 64), and the captions dictionary."""
    pictures = load_file(Path(work_dir) / "pictures.safetensors")["pictures"].float() / 127.5 - 1
    return pictures, json.loads((Path(work_dir) / "captions.json").read_text())


def augment(pictures, may_flip, generator, shift=0.06, scale=0.08):
    """Move (fraction of the width), shrink and mirror pictures in [-1, 1] on white; `may_flip` is (B,) bool."""
    b = len(pictures)
    u = torch.rand(b, 4, generator=generator)
    flip = torch.where(may_flip & (u[:, 0] < 0.5), -1.0, 1.0)
    zoom = 1 + (u[:, 1] - 0.25) * scale * 4 / 3
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = flip * zoom
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = (u[:, 2:] * 2 - 1) * 2 * shift
    grid = F.affine_grid(theta, pictures.shape, align_corners=False).to(pictures.device)
    return 1 - F.grid_sample(1 - pictures, grid, padding_mode="zeros", align_corners=False)
