#!/usr/bin/env bash
# Qwen2-VL forgets rows and columns of a picture when it is given `inputs_embeds`.
#
# Versions: torch 2.13.0, transformers 5.23.0 (Python 3.11).
#
# Rewards on Qwen2-VL (HPSv3 is one), soft prompts and adapters hand the network embeddings. One expects
# `inputs_embeds=embed(input_ids)` to be the same call as `input_ids`, with the same pixels, grid and token types. With
# `input_ids` each token of a picture gets a row and a column (M-RoPE), and a call that lacks `mm_token_type_ids` is
# refused, since positions would be wrong. With `inputs_embeds` nothing is refused: the picture's features are put
# in their places, all tokens are numbered one after the other as text is, whether `mm_token_type_ids` is there or
# not, and the scores differ. `position_ids` of the network's own `get_rope_index` bring the right ones back.
#
# Seen (relative difference of the logits to the call with input_ids):
#   inputs_embeds:                                    0.4384
#   inputs_embeds, mm_token_type_ids:                 0.4384
#   inputs_embeds, position_ids of get_rope_index:    0.0000
#   input_ids without mm_token_type_ids: refused

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 transformers==5.23.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration


torch.manual_seed(0)
PICTURE = 10
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
)
vision = dict(
    depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, initializer_range=0.5,
)
config = Qwen2VLConfig(
    text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=11, vision_start_token_id=12,
    vision_end_token_id=13,
)
network = Qwen2VLForConditionalGeneration(config).eval()
grid = torch.tensor([[1, 8, 4]])  # patches; four become a token, so the picture has 4 rows and 2 columns
picture = dict(pixel_values=torch.randn(32, 3 * 2 * 4 * 4), image_grid_thw=grid)
input_ids = torch.tensor([[5, 12, *[PICTURE] * 8, 13, 6, 7]])
types = {"mm_token_type_ids": (input_ids == PICTURE).int()}
embeddings = network.get_input_embeddings()(input_ids).detach()


@torch.no_grad()
def logits(**inputs):
    return network(**picture, **inputs).logits


right = logits(input_ids=input_ids, **types)


def difference(title, **inputs):
    result = ((logits(inputs_embeds=embeddings, **inputs) - right).norm() / right.norm()).item()
    print(f"{title + ':':49} {result:.4f}")
    return result


positions, _ = network.model.get_rope_index(input_ids, image_grid_thw=grid, **types)
bare = difference("inputs_embeds")
typed = difference("inputs_embeds, mm_token_type_ids", **types)
given = difference("inputs_embeds, position_ids of get_rope_index", position_ids=positions)
try:
    logits(input_ids=input_ids)
    refused = False
except ValueError:
    refused = True
    print("input_ids without mm_token_type_ids: refused")
if min(bare, typed) < 0.01 or given > 1e-5 or not refused:
    sys.exit("changed: embeddings get the positions that ids get, or calls without token types are taken")
PYTHON
