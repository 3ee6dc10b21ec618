# SPDX-License-Identifier: Apache-2.0
"""SD3 and 3.5."""

import torch

from pipeline_one_step import CONTEXT_FEED_FORWARD, FEED_FORWARD, JOINT_ATTENTION, Family, tokenize


ORIGINAL = """
pos_embed = pos_embed.pos_embed
x_embedder.proj = pos_embed.proj
t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
joint_blocks.* = transformer_blocks.*:
    x_block.adaLN_modulation.1 = norm1.linear
    x_block.attn.qkv = attn.to_q attn.to_k attn.to_v
    x_block.attn.ln_q = attn.norm_q
    x_block.attn.ln_k = attn.norm_k
    x_block.attn.proj = attn.to_out.0
    x_block.attn2.qkv = attn2.to_q attn2.to_k attn2.to_v
    x_block.attn2.ln_q = attn2.norm_q
    x_block.attn2.ln_k = attn2.norm_k
    x_block.attn2.proj = attn2.to_out.0
    x_block.mlp.fc1 = ff.net.0.proj
    x_block.mlp.fc2 = ff.net.2
    context_block.adaLN_modulation.1 = ~norm1_context.linear
    context_block.attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
    context_block.attn.ln_q = attn.norm_added_q
    context_block.attn.ln_k = attn.norm_added_k
    context_block.attn.proj = attn.to_add_out
    context_block.mlp.fc1 = ff_context.net.0.proj
    context_block.mlp.fc2 = ff_context.net.2
"""  # layers, see `diff_instruct/export/original.py`


class StableDiffusion3(Family):
    """SD3 and 3.5: a transformer that attends to the states of two CLIPs and of T5, padding included; pooled CLIPs."""

    name = "StableDiffusion3Pipeline"
    optional = ("text_encoder_3",)
    unused = ("feature_extractor", "image_encoder")
    lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD)
    apps = {
        "original": ORIGINAL,
        "architecture": "sd3",
        "encoder": ("TripleCLIPLoader", None, "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
        "latent": "EmptySD3LatentImage",
        "stable_diffusion_cpp": "--clip_l clip_l.safetensors --clip_g clip_g.safetensors "
        "--t5xxl t5xxl_fp16.safetensors --vae {name}_vae.safetensors",
    }
    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        states, pooled = [], []
        for tokenizer, text_encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            tokens = tokenize(tokenizer, text_encoder, prompt)
            output = text_encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clips, length = torch.cat(states, dim=-1), pipe.config.max_sequence_length
        if pipe.text_encoder_3 is None:  # the model may be used without its largest encoder
            t5 = clips.new_zeros(len(clips), length, pipe.denoiser.config.joint_attention_dim)
        else:
            tokens = tokenize(pipe.tokenizer_3, pipe.text_encoder_3, prompt, length)
            t5 = pipe.text_encoder_3(tokens.input_ids)[0]
        clips = torch.nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        embeds = torch.cat([clips, t5.to(clips.device)], dim=1)
        return {"encoder_hidden_states": embeds, "pooled_projections": torch.cat(pooled, dim=-1)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c = {k: v.to(x_t.dtype) for k, v in c.items()}
        return network(hidden_states=x_t, timestep=t, **c, return_dict=False)[0]
