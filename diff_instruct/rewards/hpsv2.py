"""Human Preference Score v2 and v2.1 (Wu et al., arXiv 2306.09341)."""

import html
import re

from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diff_instruct.rewards.clip import ClipScorer
from diff_instruct.rewards.pixels import padded_square
from diff_instruct.rewards.weights import find, load_tokenizer, network, read


REPO, TOKENIZER = "xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}

TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}


def config():
    """CLIP ViT-H/14 at 224 pixels, in transformers' terms."""
    text = {**TEXT, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "eos_token_id": 49407}
    vision = {**VISION, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


RENAMES = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_open_clip(state):
    """Tensors in open_clip's (and OpenAI's) names, as `CLIPModel` names and lays them out."""
    result = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T.contiguous()
        if ".in_proj_" in key:
            for part, rows in zip("qkv", value.chunk(3)):
                result[key.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            result[key] = value
    return result


class HPSv2(ClipScorer):
    """100 · cosine, as in the published tables (the package itself returns the cosine).

    The whole picture is seen: the longer side is resized and the rest is black, resized with antialiasing as by
    torchvision from 0.17 on.
    """

    def __init__(self, name, model, tokenizer):
        super().__init__(name, model, tokenizer, square=padded_square)

    @classmethod
    def from_pretrained(cls, name, path=None, cache_dir=None):
        """`name` is hpsv2 or hpsv2.1; the file from the Hub, or a local file, or a folder with it.

        Raises:
            ValueError: if it is not there or incomplete.
        """
        file = find(name, path, REPO, FILES[name], cache_dir)
        tokenizer = load_tokenizer(CLIPTokenizer, name, path, TOKENIZER, cache_dir)
        state = read(file)
        return cls.from_state(name, state.get("state_dict", state), tokenizer, file, config())

    @classmethod
    def from_state(cls, name, state, tokenizer, source, config):
        """From the published tensors, with open_clip's names; `source` is named if they do not fit.

        Raises:
            ValueError: if a tensor is missing or has another shape.
        """
        return cls(name, network(CLIPModel, config, from_open_clip(state), source), tokenizer)

    def tokenize(self, prompts):
        """As open_clip does: HTML entities are read twice over."""
        return super().tokenize([html.unescape(html.unescape(p)) for p in prompts])

    def forward(self, pixels, prompts):
        """HPS (B,), about 20 to 35, of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        return 100 * super().forward(pixels, prompts)
