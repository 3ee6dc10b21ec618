"""Our side of `reward_parity.py`: our rewards with the oracle's weights, and how far they are from its outputs."""

import json
from functools import partial

import tokenizers
import torch
from safetensors.torch import load_file
from transformers import (
    BatchEncoding,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
)

from diff_instruct.rewards.aesthetic import Aesthetic, LinearMLP
from diff_instruct.rewards.clip import ClipScore, ClipScorer
from diff_instruct.rewards.hpsv2 import HPSv2, from_open_clip
from diff_instruct.rewards.hpsv3 import HPSv3
from diff_instruct.rewards.image_reward import ImageReward, configs
from diff_instruct.rewards.pickscore import PickScore
from diff_instruct.rewards.weights import load_tokenizer, network, read
from tests.parity.reward_inputs import (
    CHAT,
    CONFIGS,
    PROMPTS,
    SAID,
    SIZES,
    byte_tokenizer,
    bytes_of,
    pictures,
    qwen2_vl,
    random_state,
    reward_of,
)


SOURCE = "the oracle's state"
BAR = 1e-5  # for score and gradient of the same picture, where they are below 1


class GivenTokens:
    """A tokenizer that returns tokens which were saved: (B, L) ids and attention mask, by the number of prompts."""

    def __init__(self, *tokens):
        self.tokens = {len(t["input_ids"]): t for t in tokens}

    def __call__(self, prompts, return_tensors=None, **_):
        tokens = self.tokens[len(prompts)]
        if return_tensors is None:
            return {"input_ids": [ids[mask.bool()].tolist() for ids, mask in zip(*tokens.values())]}
        return BatchEncoding(tokens)


def saved_tokens(outputs):
    """The tokens in `outputs.safetensors`, for the pictures and for the PIL pictures."""
    return [{k: outputs[prefix + k].clone() for k in ("input_ids", "attention_mask")} for prefix in ("", "pil_")]


def blip_configs(case):
    """(vision, text) of an ImageReward of this size."""
    if case == "image_reward_full":
        return configs()
    (width, layers, heads), (text_width, text_layers, text_heads) = CONFIGS[case]["vision"], CONFIGS[case]["text"]
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=CONFIGS[case]["image"], patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=text_layers,
        num_attention_heads=text_heads, vocab_size=64, encoder_hidden_size=width, layer_norm_eps=1e-12,
        is_decoder=True,
    )  # fmt: skip
    return vision, text


def clip_config(case):
    """The CLIPModel of this case: OpenAI's has another activation than those of open_clip."""
    size, activation = CONFIGS[case], "quick_gelu" if reward_of(case) in ("clip", "aesthetic") else "gelu"

    def tower(width, layers, heads):
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "hidden_act": activation,
        }  # fmt: skip

    vision = {**tower(*size["vision"]), "image_size": size["image"], "patch_size": size["patch"]}
    text = {**tower(*size["text"]), "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=size["project"])


def tiny_image_reward(state, tokenizer):
    """Our ImageReward of the tiny size."""
    return ImageReward.from_state(state, tokenizer, SOURCE, *blip_configs("image_reward_tiny"))


def tiny_hpsv3(state, said=SAID):
    """Our HPSv3 of the tiny size; `said` as its `words`."""
    text, vision = qwen2_vl(CONFIGS["hpsv3_tiny"])
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    rope.pop("type")
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=256 + CHAT.index("<|image_pad|>"),
    )
    tokenizer = byte_tokenizer(tokenizers, Qwen2Tokenizer)
    return HPSv3.from_state(state, tokenizer, said, SOURCE, config, area=CONFIGS["hpsv3_tiny"]["image"] ** 2)


def load(case, folder):
    """Our reward, from the oracle's checkpoint and tokenizer files; where a size can be given only by a
    configuration beside the published weights, as users load it."""
    reward = reward_of(case)
    if reward in ("pickscore", "clip", "aesthetic"):
        return {"pickscore": PickScore, "clip": ClipScore, "aesthetic": Aesthetic}[reward].from_pretrained(folder)
    if case == "hpsv2_tiny":
        tokenizer = load_tokenizer(CLIPTokenizer, "hpsv2", folder, "none")
        return HPSv2.from_state("hpsv2", read(folder / "checkpoint.pt")["state_dict"], tokenizer, SOURCE,
                                clip_config(case))  # fmt: skip
    if case == "hpsv3_tiny":
        return tiny_hpsv3(read(folder / "checkpoint.pt"))
    if case == "image_reward_tiny":
        tokenizer = load_tokenizer(BertTokenizer, "image_reward", folder, "none")
        return tiny_image_reward(read(folder / "checkpoint.pt"), tokenizer)
    if case == "hpsv2_full":
        return HPSv2.from_pretrained("hpsv2", folder / "checkpoint.pt")
    return ImageReward.from_pretrained(folder / "checkpoint.pt")


def load_saved(case, folder):
    """The same without the checkpoint: the weights drawn again, the tokens as they were saved."""
    state = random_state(json.loads((folder / "shapes.json").read_text()))
    outputs, reward = load_file(folder / "outputs.safetensors"), reward_of(case)
    if reward == "hpsv3":
        return tiny_hpsv3(state)
    tokenizer = None if reward == "aesthetic" else GivenTokens(*saved_tokens(outputs))
    if reward == "image_reward":
        return tiny_image_reward(state, tokenizer)
    config = clip_config(case)
    if reward == "hpsv2":
        return HPSv2.from_state("hpsv2", state, tokenizer, SOURCE, config)
    if reward == "pickscore":
        return PickScore("pickscore", network(CLIPModel, config, state, SOURCE), tokenizer)
    openai = {k.removeprefix("clip_model."): v for k, v in state.items()}
    model = network(CLIPModel, config, from_open_clip(openai), SOURCE)
    if reward == "clip":
        return ClipScore("clip", model, tokenizer)
    mlp = {k.removeprefix("mlp."): v for k, v in state.items()}
    return Aesthetic(model, LinearMLP.from_state(config.projection_dim, mlp, SOURCE))


def bar(expected):
    """How far from `expected` counts as the same: rounding grows with the value, and PickScore's are near 24."""
    return BAR * max(1, expected.abs().max().item())


def differences(case, reward, outputs):
    """Largest absolute difference of score, gradient and end-to-end score, in units of the original package.

    hpsv2 and CLIPScore return the cosine there; here it is 100 times that. CLIPScore's is compared below 0, too, where
    random weights often are and our score is 0.
    """
    unit, size = (100 if reward_of(case) == "hpsv2" else 1), CONFIGS[case]["image"]
    if reward_of(case) == "clip":
        reward = partial(ClipScorer.forward, reward)
    n = len(outputs["score"])
    pixels = pictures(n, size, size).requires_grad_()
    r = reward(pixels, PROMPTS[-n:]) / unit
    (gradient,) = torch.autograd.grad(r.sum(), pixels)
    images = [bytes_of(*s).permute(2, 0, 1)[None] / 255 for s in SIZES]
    with torch.no_grad():
        end_to_end = torch.cat([reward(image, [PROMPTS[-1]]) for image in images]) / unit
    ours = {"score": r.detach(), "gradient": gradient, "end_to_end": end_to_end}
    return {k: (v - outputs[k]).abs().max().item() for k, v in ours.items()}
