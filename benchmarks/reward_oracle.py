"""The original packages' side of `reward_parity.py`: runs in the isolated environment that it builds, not in ours.

`python reward_oracle.py CASE FOLDER` builds the network of the original package, gives it random weights by seed,
saves them in the published layout as FOLDER/checkpoint.pt, and writes FOLDER/outputs.safetensors: `score` (B,) and
`gradient` (B, 3, H, W), of the sum of the scores in the pixels, on pictures of the network's own size; `end_to_end`
(P,), the scores of PIL pictures of other sizes; `input_ids` and `attention_mask` (B, L), and the same for the PIL
pictures with `pil_` before it.

Needs nothing of this repository: `random_state` and `pictures` are imported by the other side, too.
"""

import json
import sys
import types
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch


PROMPTS = ["a red apple", "a painting of an ocean with clouds and birds , day time , low depth field effect"]
SIZES = [(224, 224), (300, 300), (260, 400), (512, 320)]  # of the PIL pictures, (height, width)

# image size, patch, width, layers, heads; text: width, layers, heads, vocabulary
CONFIGS = {
    "image_reward_tiny": {"image": 32, "patch": 16, "vision": (48, 2, 4), "text": (32, 2, 4)},
    "image_reward_full": {"image": 224, "patch": 16, "vision": (1024, 24, 16), "text": (768, 12, 12)},
    "hpsv2_tiny": {"image": 28, "patch": 14, "vision": (32, 2, 2), "text": (24, 2, 2)},
}
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] , a an red apple painting of ocean with clouds and birds day time low depth field"
)


def random_state(shapes):
    """A tensor for each name, drawn by the name, of a size that keeps activations near 1.

    Args:
        shapes (`dict`): name to shape.
    """
    state = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name == "logit_scale":
            state[name] = torch.tensor(4.6)
        elif len(shape) > 1 and max(shape[1:]) > 1:
            state[name] = draw / torch.tensor(shape[1:]).prod().item() ** 0.5
        else:
            state[name] = 0.1 * draw + (1.0 if name.endswith("weight") else 0.0)
    return state


def pictures(n, height, width, seed=0):
    """n pictures (n, 3, height, width) in [0, 1]: coarse blots with fine noise on them."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(
        torch.rand(n, 3, 6, 6, generator=rng), size=(height, width), mode="bilinear"
    )
    return (0.8 * coarse + 0.2 * torch.rand(n, 3, height, width, generator=rng)).clamp(0, 1)


def bytes_of(height, width):
    """One picture as bytes (height, width, 3), as a file has them."""
    return (pictures(1, height, width, seed=height + width)[0] * 255).round().byte().permute(1, 2, 0)


def without_init(name):
    """Lets modules of a package be imported without its `__init__`, which imports what is not installed here."""
    package = types.ModuleType(name)
    package.__path__ = list(find_spec(name).submodule_search_locations)
    sys.modules[name] = package


def load_random(model):
    """Random weights into the parameters; returns the whole state, in the published layout."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(random_state(shapes), strict=False)
    return model.eval().state_dict()


def image_reward(size, folder):
    """(state, score of (pixels, tokens), tokens of prompts, preprocessing of PIL pictures) of `image-reward`."""
    without_init("ImageReward")
    from ImageReward import ImageReward as package
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    width, layers, heads = size["text"]
    med = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "vocab_size": 30524 if width == 768 else 64,
        "max_position_embeddings": 512, "add_cross_attention": True, "pad_token_id": 0, "model_type": "bert",
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med))
    vision_width, vision_layers, vision_heads = size["vision"]
    network = VisionTransformer(
        img_size=size["image"], patch_size=16, embed_dim=vision_width, depth=vision_layers, num_heads=vision_heads
    )
    blip_pretrain.create_vit = lambda *_: (network, vision_width)  # as `large` for the full size, but for drop path
    blip_pretrain.init_tokenizer = lambda: BertTokenizer(folder / "vocab.txt")  # bert-base-uncased is on the Hub
    original_mlp = package.MLP
    package.MLP = lambda _: original_mlp(width)
    model = package.ImageReward(folder / "med_config.json")
    state = load_random(model)

    def tokens(prompts):
        return model.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")

    def score(pixels, t):
        return model.score_gard(t["input_ids"], t["attention_mask"], pixels).squeeze(-1)

    return state, score, tokens, package._transform(size["image"])


def hpsv2(size, folder):
    """(state, score of (pixels, tokens), tokens of prompts, preprocessing of PIL pictures) of `hpsv2`'s open_clip."""
    bpe = Path(find_spec("clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"  # which hpsv2 1.2.0 forgot
    target = Path(find_spec("hpsv2").origin).parent / "src" / "open_clip" / bpe.name
    if not target.is_file():
        target.write_bytes(bpe.read_bytes())
    without_init("hpsv2")
    from hpsv2.src.open_clip import transform
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import _tokenizer, tokenize

    # It resizes tensors: with antialiasing from torchvision 0.17 on; the one that imports here has to be told.
    resize = transform.F.resize
    transform.F.resize = lambda *args: resize(*args, antialias=True)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # in the published tokenizer
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): v for k, v in _tokenizer.encoder.items()}))
    merges = sorted(_tokenizer.bpe_ranks, key=_tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")

    width, layers, heads = size["vision"]
    text_width, text_layers, text_heads = size["text"]
    model = CLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": size["image"], "patch_size": size["patch"], "width": width, "layers": layers,
            "head_width": width // heads,
        },
        text_cfg={
            "context_length": 77, "vocab_size": 49408, "width": text_width, "layers": text_layers, "heads": text_heads,
        },
        output_dict=True,
    )  # fmt: skip
    state = load_random(model)

    def tokens(prompts):
        ids = tokenize(prompts)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def score(pixels, t):
        output = model(pixels, t["input_ids"])
        return (output["image_features"] * output["text_features"]).sum(dim=-1)

    return state, score, tokens, transform.image_transform(size["image"], is_train=False, resize_longest_max=True)


def main():
    from PIL import Image
    from safetensors.torch import save_file

    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    size = CONFIGS[case]
    build = image_reward if case.startswith("image_reward") else hpsv2
    state, score, tokens, preprocess = build(size, folder)
    torch.save({"state_dict": state} if build is hpsv2 else state, folder / "checkpoint.pt")
    (folder / "shapes.json").write_text(json.dumps({k: list(v.shape) for k, v in state.items()}, indent=0))

    n = 1 if size["image"] == 224 else 2
    t = tokens(PROMPTS[-n:])
    pixels = pictures(n, size["image"], size["image"]).requires_grad_()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    scale = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
    r = score((pixels - scale[0]) / scale[1], t)
    (gradient,) = torch.autograd.grad(r.sum(), pixels)

    images = [Image.fromarray(bytes_of(*s).numpy()) for s in SIZES]
    pil_tokens = tokens([PROMPTS[-1]])
    with torch.no_grad():
        end_to_end = torch.cat([score(preprocess(image)[None], pil_tokens) for image in images])
    outputs = {"score": r.detach(), "gradient": gradient, "end_to_end": end_to_end}
    ids = {**{k: t[k] for k in ("input_ids", "attention_mask")}, "pil_input_ids": pil_tokens["input_ids"]}
    ids["pil_attention_mask"] = pil_tokens["attention_mask"]
    save_file({k: v.contiguous() for k, v in {**outputs, **ids}.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main()
