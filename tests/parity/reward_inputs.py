"""What the two sides of `reward_parity.py` share: sizes of networks, random weights, pictures, prompts.

Imported by the original packages' side, too, in another environment: needs nothing but torch.
"""

import zlib
from pathlib import Path

import torch


ORACLE = Path(__file__).resolve().parents[1] / "oracle"  # what the original packages scored, committed
PROMPTS = ["a red apple", "a painting of an ocean with clouds and birds , day time , low depth field effect"]
SIZES = [(224, 224), (300, 300), (260, 400), (512, 320)]  # of the PIL pictures, (height, width)
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] , a an red apple painting of ocean with clouds and birds day time low depth field"
)

# image size, patch, width of the common space; vision and text: width, layers, heads
VIT_H = {"image": 224, "patch": 14, "project": 1024, "vision": (1280, 32, 16), "text": (1024, 24, 16)}
VIT_L = {"image": 224, "patch": 14, "project": 768, "vision": (1024, 24, 16), "text": (768, 12, 12)}
VIT_TINY = {"image": 28, "patch": 14, "project": 16, "vision": (32, 2, 2), "text": (24, 2, 2)}
OPENAI_TINY = {**VIT_TINY, "vision": (128, 2, 2)}  # OpenAI's code has heads of width 64
CONFIGS = {
    "image_reward_tiny": {"image": 32, "patch": 16, "vision": (48, 2, 4), "text": (32, 2, 4)},
    "hpsv2_tiny": VIT_TINY,
    "pickscore_tiny": VIT_TINY,
    "clip_tiny": OPENAI_TINY,
    "aesthetic_tiny": OPENAI_TINY,
    "hpsv3_tiny": {"image": 84, "patch": 14, "vision": (32, 2, 2), "text": (48, 2, 4)},
    "image_reward_full": {"image": 224, "patch": 16, "vision": (1024, 24, 16), "text": (768, 12, 12)},
    "hpsv2_full": VIT_H,
    "pickscore_full": VIT_H,
    "clip_full": VIT_L,
    "aesthetic_full": VIT_L,
}


def qwen2_vl(size):
    """A small Qwen2-VL, in the terms of transformers 4.45: those of its config, and of its vision tower's. Its
    vocabulary are bytes and the tokens of the chat, see `byte_tokenizer`."""
    (width, layers, heads), (seen_width, seen_layers, seen_heads) = size["text"], size["vision"]
    half = width // heads // 2
    text = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "rms_norm_eps": 1e-6,
        "vocab_size": 256 + len(CHAT) + 1, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 4, 2, 2]},
    }  # fmt: skip
    vision = {"depth": seen_layers, "embed_dim": seen_width, "num_heads": seen_heads, "hidden_size": width}
    return text, vision


CHAT = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


SAID = (
    "How well does this show what is asked for?\n{text_prompt}\n",
    "\nA rating: <|Reward|>\n",
)  # in place of hpsv3's


def byte_tokenizer(tokenizers, cls):
    """Qwen2-VL's own is on the Hub: here every byte is a token, and every word of the chat, as there."""
    model = tokenizers.models.BPE(
        vocab={c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return cls(tokenizer_object=tokenizer, pad_token=CHAT[0], additional_special_tokens=CHAT[1:])


def reward_of(case):
    """The reward's name in the name of a case."""
    return case.rpartition("_")[0]


def random_state(shapes):
    """A tensor for each name, drawn by the name, of a size that keeps activations near 1.

    Args:
        shapes (`dict`): name to shape.
    """
    state = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("logit_scale"):
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
