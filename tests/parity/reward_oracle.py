"""The original packages' side of `reward_parity.py`: runs in the isolated environment that it builds, not in ours.

`python reward_oracle.py CASE FOLDER` builds the network of the original package, gives it random weights by seed,
saves them in FOLDER as the published checkpoint is laid out, their names and shapes in FOLDER/shapes.json, and writes
FOLDER/outputs.safetensors: `score` (B,) and `gradient` (B, 3, H, W), of the sum of the scores in the pixels, on
pictures of the network's own size; `end_to_end` (P,), the scores of PIL pictures of other sizes; `input_ids` and
`attention_mask` (B, L) if it reads prompts, and the same for the PIL pictures with `pil_` before it.

One function for each package. It takes the network's size and FOLDER, and returns the parameters' names and shapes,
the score of (pixels, tokens), the tokens of prompts, and the preprocessing of PIL pictures.
"""

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from reward_inputs import (
    CONFIGS,
    PROMPTS,
    SAID,
    SIZES,
    WORDS,
    byte_tokenizer,
    bytes_of,
    pictures,
    qwen2_vl,
    random_state,
    reward_of,
)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def without_init(name):
    """Lets modules of a package be imported without its `__init__`, which imports what is not installed here."""
    package = types.ModuleType(name)
    package.__path__ = list(find_spec(name).submodule_search_locations)
    sys.modules[name] = package


def load_random(model):
    """Random weights into the parameters, which need no gradient; returns their names and shapes."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(random_state(shapes), strict=False)
    model.eval().requires_grad_(False)
    return shapes


def save_clip_tokenizer(folder):
    """CLIP's tokenizer, which all of them use, as on the Hub: vocab.json and merges.txt."""
    from clip.clip import _tokenizer

    (folder / "vocab.json").write_text(json.dumps(_tokenizer.encoder))
    merges = sorted(_tokenizer.bpe_ranks, key=_tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")


def masked(ids):
    """Tokens of ids (B, 77) that are filled up with zeros."""
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def image_reward(size, folder):
    """`image-reward`."""
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
    shapes = load_random(model)
    torch.save(model.state_dict(), folder / "checkpoint.pt")

    def tokens(prompts):
        return model.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")

    def score(pixels, t):
        return model.score_gard(t["input_ids"], t["attention_mask"], pixels).squeeze(-1)

    return shapes, score, tokens, package._transform(size["image"])


def hpsv2(size, folder):
    """`hpsv2`'s open_clip."""
    bpe = Path(find_spec("clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"  # which hpsv2 1.2.0 forgot
    target = Path(find_spec("hpsv2").origin).parent / "src" / "open_clip" / bpe.name
    if not target.is_file():
        target.write_bytes(bpe.read_bytes())
    without_init("hpsv2")
    from hpsv2.src.open_clip import transform
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize

    # It resizes tensors: with antialiasing from torchvision 0.17 on; the one that imports here has to be told.
    resize = transform.F.resize
    transform.F.resize = lambda *args: resize(*args, antialias=True)
    save_clip_tokenizer(folder)

    width, layers, heads = size["vision"]
    text_width, text_layers, text_heads = size["text"]
    model = CLIP(
        embed_dim=size["project"],
        vision_cfg={
            "image_size": size["image"], "patch_size": size["patch"], "width": width, "layers": layers,
            "head_width": width // heads,
        },
        text_cfg={
            "context_length": 77, "vocab_size": 49408, "width": text_width, "layers": text_layers, "heads": text_heads,
        },
        output_dict=True,
    )  # fmt: skip
    shapes = load_random(model)
    torch.save({"state_dict": model.state_dict()}, folder / "checkpoint.pt")

    def score(pixels, t):
        output = model(pixels, t["input_ids"])
        return (output["image_features"] * output["text_features"]).sum(dim=-1)

    preprocess = transform.image_transform(size["image"], is_train=False, resize_longest_max=True)
    return shapes, score, lambda prompts: masked(tokenize(prompts)), preprocess


def clip_model(size, activation):
    """transformers' CLIPModel of this size; published configurations say eos 2, which stands for the largest id."""
    from transformers import CLIPConfig, CLIPModel

    def tower(width, layers, heads):
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "hidden_act": activation, "projection_dim": size["project"],
        }  # fmt: skip

    vision = {**tower(*size["vision"]), "image_size": size["image"], "patch_size": size["patch"]}
    text = {**tower(*size["text"]), "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size["project"])).eval()


def pickscore(size, folder):
    """transformers' CLIPModel, used as on PickScore's model card."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    save_clip_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = clip_model(size, "gelu")
    shapes = load_random(model)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": size["image"]}, crop_size=size["image"])

    def tokens(prompts):
        return tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")

    def score(pixels, t):
        image = F.normalize(model.get_image_features(pixels), dim=-1)
        text = F.normalize(model.get_text_features(**t), dim=-1)
        return model.logit_scale.exp() * (image * text).sum(dim=-1)

    return shapes, score, tokens, lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]


def openai_clip(size, folder, module):
    """(a score class of `image-reward`'s `module` with random weights, their names and shapes); its CLIP is OpenAI's.

    The class would load ViT-L/14 by itself. The published CLIP is what transformers' converter made of OpenAI's.
    """
    without_init("ImageReward")
    from importlib import import_module

    import clip
    from transformers.models.clip import convert_clip_original_pytorch_to_hf as converter

    (width, layers, _), (text_width, text_layers, text_heads) = size["vision"], size["text"]
    network = clip.model.CLIP(
        size["project"], size["image"], layers, width, size["patch"], 77, 49408, text_width, text_heads, text_layers
    )
    clip.load = lambda *_, **__: (network, clip.clip._transform(size["image"]))
    package = import_module(f"ImageReward.models.{module}")
    if module == "AestheticScore":
        original_mlp = package.MLP
        package.MLP = lambda _: original_mlp(size["project"])
    model = getattr(package, module)(download_root=None)
    shapes = load_random(model)

    save_clip_tokenizer(folder)
    published = clip_model(size, "quick_gelu")
    with torch.no_grad():
        converter.copy_text_model_and_projection(published, network)
        converter.copy_vison_model_and_projection(published, network)
        published.logit_scale.copy_(network.logit_scale)
        for p in published.parameters():  # the copies are views
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    published.save_pretrained(folder)
    return model, shapes


def clip(size, folder):
    """`image-reward`'s CLIPScore: the cosine, with OpenAI's CLIP."""
    from clip import tokenize

    model, shapes = openai_clip(size, folder, "CLIPScore")

    def score(pixels, t):
        text = F.normalize(model.clip_model.encode_text(t["input_ids"]))
        return (text * F.normalize(model.clip_model.encode_image(pixels))).sum(dim=1)

    return shapes, score, lambda prompts: masked(tokenize(prompts, truncate=True)), model.preprocess


def aesthetic(size, folder):
    """`image-reward`'s AestheticScore."""
    model, shapes = openai_clip(size, folder, "AestheticScore")
    torch.save(model.mlp.state_dict(), folder / "aesthetic-model.pth")

    def score(pixels, _):
        return model.mlp(F.normalize(model.clip_model.encode_image(pixels))).squeeze(-1)

    return shapes, score, lambda prompts: {}, model.preprocess


NOT_FOR_HPSV3 = (  # what its modules import for training and for films
    "datasets", "matplotlib", "matplotlib.patches", "matplotlib.pyplot", "pandas", "peft", "requests", "torchvision",
    "torchvision.transforms", "torchvision.transforms.functional", "torch.utils.tensorboard", "transformers.trainer",
    "transformers.trainer_callback", "transformers.trainer_pt_utils", "transformers.training_args", "trl",
    "hpsv3.utils.training_utils",
)  # fmt: skip
QWEN2_VL_CHAT = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hpsv3(size, folder):
    """`hpsv3` 1.0.0: its network, and what it does to pictures and prompts before; of Qwen2-VL's tokenizer only the
    chat's template."""
    import tokenizers
    import transformers
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    for name in NOT_FOR_HPSV3:
        sys.modules[name] = MagicMock()
    without_init("hpsv3")
    from hpsv3.dataset import data_collator_qwen as collating
    from hpsv3.dataset.utils import fetch_image
    from hpsv3.model.differentiable_image_processor import Qwen2VLImageProcessor as Differentiable
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    tokenizer = byte_tokenizer(tokenizers, transformers.Qwen2TokenizerFast)
    tokenizer.padding_side = "right"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    image_token, token = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|Reward|>"])
    text, vision = qwen2_vl(size)
    config = transformers.Qwen2VLConfig(
        **text, vision_config=vision, image_token_id=image_token, pad_token_id=tokenizer.pad_token_id
    )
    config._attn_implementation = "sdpa"
    model = Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=[token], rm_head_type="ranknet"
    )
    shapes = load_random(model)
    torch.save(model.state_dict(), folder / "checkpoint.pt")
    processor = transformers.Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=QWEN2_VL_CHAT)
    collating.INSTRUCTION, collating.prompt_with_special_token = SAID  # the authors' words are not kept here
    collator, area = collating.QWen2VLDataCollator(processor), size["image"] ** 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def score(pixels, prompts):
        blank = [Image.new("RGB", (pixels.shape[3], pixels.shape[2]))] * len(pixels)
        chats = processor.apply_chat_template(
            collator._clean_message(prompts, blank), tokenize=False, add_generation_prompt=True
        )
        batch = processor(text=chats, images=blank, padding=True, return_tensors="pt")
        plain = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        patches = [Differentiable()._preprocess_differentiable(p, **plain)[0] for p in pixels]
        batch["pixel_values"] = torch.cat(patches)
        return model(**batch, return_dict=True)["logits"][:, 0]

    def preprocess(image):
        image = fetch_image({"image": image, "min_pixels": area, "max_pixels": area})
        pixels = torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1) / 255
        return (pixels - mean) / std

    return shapes, score, list, preprocess


def main():
    from PIL import Image
    from safetensors.torch import save_file

    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    size = CONFIGS[case]
    build = {f.__name__: f for f in (image_reward, hpsv2, hpsv3, pickscore, clip, aesthetic)}[reward_of(case)]
    shapes, score, tokens, preprocess = build(size, folder)
    (folder / "shapes.json").write_text(json.dumps({k: list(v) for k, v in shapes.items()}, indent=0))

    n = 1 if size["image"] == 224 else 2
    t = tokens(PROMPTS[-n:])
    pixels = pictures(n, size["image"], size["image"]).requires_grad_()
    scale = [torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD)]
    r = score((pixels - scale[0]) / scale[1], t)
    (gradient,) = torch.autograd.grad(r.sum(), pixels)

    images = [Image.fromarray(bytes_of(*s).numpy()) for s in SIZES]
    pil_tokens = tokens([PROMPTS[-1]])
    with torch.no_grad():
        end_to_end = torch.cat([score(preprocess(image)[None], pil_tokens) for image in images])
    outputs = {"score": r.detach(), "gradient": gradient, "end_to_end": end_to_end}
    for prefix, ids in (("", t), ("pil_", pil_tokens)):
        outputs |= {prefix + k: ids[k] for k in ("input_ids", "attention_mask") if ids and not isinstance(ids, list)}
    save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main()
