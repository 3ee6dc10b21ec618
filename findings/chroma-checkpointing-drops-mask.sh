#!/usr/bin/env bash
# Chroma computes another function when gradient checkpointing is on.
#
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, accelerate 1.15.0, sentencepiece 0.2.3 (Python 3.11).
#
# Gradient checkpointing trades time for memory, so one expects the same output and the same gradient. In
# ChromaTransformer2DModel the checkpointed branch of the single-stream blocks (38 of Chroma's 57) leaves out the
# attention mask that the other branch passes. A network that is trained with checkpointing is therefore not the
# one that the pipeline samples from, where gradients, and with them checkpointing, are off. Nothing is raised. The
# inputs here are those of a call of the stock pipeline, recorded by a hook; without the mask both ways are equal.
#
# Seen (relative differences, checkpointing on against off):
#   the pipeline's mask: output 0.0760, gradient of the parameters 0.1526
#   no mask:             output 0.0000, gradient of the parameters 0.0000

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 sentencepiece==0.2.3

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel, T5Tokenizer

torch.manual_seed(0)
words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -1.0), ("▁apple", -1.0)]
tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
text_encoder = T5EncoderModel(
    T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
).eval()
transformer = ChromaTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=16,
    approximator_layers=1,
)
vae = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    block_out_channels=(8, 8), norm_num_groups=4,
)
for parameter in transformer.parameters():
    torch.nn.init.normal_(parameter, std=0.2)

pipe = ChromaPipeline(FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer)
pipe.set_progress_bar_config(disable=True)
calls = []
hook = transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
pipe("a red apple", height=32, width=32, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=32,
     output_type="latent")
hook.remove()
transformer.train()


def output_and_gradient(inputs):
    transformer.zero_grad()
    output = transformer(**inputs)[0]
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


def difference(inputs):
    transformer.disable_gradient_checkpointing()
    plain = output_and_gradient(inputs)
    transformer.enable_gradient_checkpointing()
    checkpointed = output_and_gradient(inputs)
    return [((b - a).norm() / a.norm()).item() for a, b in zip(plain, checkpointed)]


masked, unmasked = difference(calls[0]), difference({**calls[0], "attention_mask": None})
print(f"the pipeline's mask: output {masked[0]:.4f}, gradient of the parameters {masked[1]:.4f}")
print(f"no mask:             output {unmasked[0]:.4f}, gradient of the parameters {unmasked[1]:.4f}")
if min(masked) < 0.01 or max(unmasked) > 1e-5:
    sys.exit("changed: checkpointing no longer changes what Chroma computes with a mask, and only then")
PYTHON
