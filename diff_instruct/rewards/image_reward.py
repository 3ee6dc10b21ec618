"""ImageReward (Xu et al., arXiv 2304.05977): a BLIP that reads the prompt while it looks at the picture."""

import re

import torch.nn.functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diff_instruct.rewards.aesthetic import LinearMLP
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.catalogue import CATALOGUE
from diff_instruct.rewards.pixels import CLIP_MEAN, CLIP_STD, centre_square, full_precision, normalise
from diff_instruct.rewards.weights import find, load_tokenizer, network, read


REPO, FILE, TOKENIZER = "zai-org/ImageReward", "ImageReward.pt", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' pictures
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def configs():
    """(vision, text) of the published network, in transformers' terms."""
    vision = BlipVisionConfig(**VISION, image_size=224, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(
        **TEXT, vocab_size=30524, encoder_hidden_size=VISION["hidden_size"], layer_norm_eps=1e-12, is_decoder=True
    )  # a decoder in name only: that is how transformers is told to build cross-attention
    return vision, text


RENAMES = [
    (r"^visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^text_encoder\.", "text."),
]


def split_state(state):
    """The published tensors, as three dicts in the names of BlipVisionModel, BlipTextModel and LinearMLP."""
    parts = {"vision": {}, "text": {}, "mlp": {}}
    for key, value in state.items():
        key = key.removeprefix("blip.")
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        part, _, key = key.partition(".")
        if part in parts:  # vision_proj and text_proj do not enter the score
            parts[part][key] = value
    return parts["vision"], parts["text"], parts["mlp"]


class ImageReward(Scorer):
    """The score of the `image-reward` package: mean 0 and spread 1 over its authors' pictures.

    Args:
        vision (`BlipVisionModel`), text (`BlipTextModel`), mlp (`LinearMLP`): the networks.
        tokenizer (`BertTokenizer`): prompts are cut at 35 tokens.
    """

    def __init__(self, vision, text, mlp, tokenizer):
        super().__init__("image_reward", tokenizer, CATALOGUE["image_reward"].tokens, padding="max_length")
        self.vision, self.text, self.mlp = vision, text, mlp
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path=None, cache_dir=None):
        """From the Hub, or a local copy of ImageReward.pt, or a folder with it (and, maybe, bert's tokenizer).

        Raises:
            ValueError: if it is not there or incomplete.
        """
        file = find("image_reward", path, REPO, FILE, cache_dir)
        tokenizer = load_tokenizer(BertTokenizer, "image_reward", path, TOKENIZER, cache_dir)
        return cls.from_state(read(file), tokenizer, file, *configs())

    @classmethod
    def from_state(cls, state, tokenizer, source, vision_config, text_config):
        """From the published tensors, with their published names; `source` is named if they do not fit.

        Raises:
            ValueError: if a tensor is missing or has another shape.
        """
        vision, text, mlp = split_state(state)
        vision = network(BlipVisionModel, vision_config, vision, source)
        text = network(BlipTextModel, text_config, text, source, add_pooling_layer=False)
        return cls(vision, text, LinearMLP.from_state(text_config.hidden_size, mlp, source), tokenizer)

    def look(self, pixels):
        """Embeddings (B, N, D) of pixels (B, 3, H, W): the whole picture, then its patches."""
        pixels = normalise(centre_square(pixels, self.vision.config.image_size), CLIP_MEAN, CLIP_STD)
        return self.vision(pixels.to(self.dtype)).last_hidden_state

    def image_features(self, pixels):
        """Unit vectors (B, D) of pixels (B, 3, H, W)."""
        return F.normalize(full_precision(self.look(pixels)[:, 0]), dim=-1)

    def forward(self, pixels, prompts):
        """ImageReward (B,), about −2 to 2, of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        tokens = self.tokenize(prompts)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.look(pixels),
            is_decoder=False,
        ).last_hidden_state
        return (full_precision(self.mlp(hidden[:, 0])) - MEAN) / STD
