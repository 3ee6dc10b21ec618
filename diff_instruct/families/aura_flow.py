# SPDX-License-Identifier: Apache-2.0
"""AuraFlow."""

from pipeline_one_step import JOINT_ATTENTION, Family, Grid, tokenize


ORIGINAL = """
positional_encoding = pos_embed.pos_embed
init_x_linear = pos_embed.proj
cond_seq_linear = context_embedder
t_embedder.mlp.0 = time_step_proj.linear_1
t_embedder.mlp.2 = time_step_proj.linear_2
modF.1 = ~norm_out.linear
final_linear = proj_out
double_layers.* = joint_transformer_blocks.*:
    modX.1 = norm1.linear
    modC.1 = norm1_context.linear
    attn.w2q = attn.to_q
    attn.w2k = attn.to_k
    attn.w2v = attn.to_v
    attn.w2o = attn.to_out.0
    attn.w1q = attn.add_q_proj
    attn.w1k = attn.add_k_proj
    attn.w1v = attn.add_v_proj
    attn.w1o = attn.to_add_out
    mlpX.c_fc1 = ff.linear_1
    mlpX.c_fc2 = ff.linear_2
    mlpX.c_proj = ff.out_projection
    mlpC.c_fc1 = ff_context.linear_1
    mlpC.c_fc2 = ff_context.linear_2
    mlpC.c_proj = ff_context.out_projection
single_layers.* = single_transformer_blocks.*:
    modCX.1 = norm1.linear
    attn.w1q = attn.to_q
    attn.w1k = attn.to_k
    attn.w1v = attn.to_v
    attn.w1o = attn.to_out.0
    mlp.c_fc1 = ff.linear_1
    mlp.c_fc2 = ff.linear_2
    mlp.c_proj = ff.out_projection
"""  # layers, see `diff_instruct/export/original.py`


class AuraFlow(Family):
    """AuraFlow: a transformer over the tokens of image and prompt (T5's states; padding is zero and attended to)."""

    name = "AuraFlowPipeline"
    lora_targets = (*JOINT_ATTENTION, "linear_1", "linear_2", "out_projection")
    apps = {
        "original": ORIGINAL,
        "architecture": "aura",
        "encoder": ("CLIPLoader", "stable_diffusion", "{name}_text_encoder.safetensors"),
        "vae": "sdxl_vae.safetensors",
    }
    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, pipe.config.max_sequence_length)
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": states * tokens.attention_mask[..., None]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        time, c = (t / pipe.schedule.steps).to(x_t.dtype), c["encoder_hidden_states"].to(x_t.dtype)
        return network(x_t, encoder_hidden_states=c, timestep=time, return_dict=False)[0]

    @staticmethod
    def grid(network, vae):
        factor, patch = 2 ** (len(vae.block_out_channels) - 1), network.patch_size
        side = min(128, patch * int(network.pos_embed_max_size**0.5))  # it has no more positions
        return Grid(network.in_channels, factor, factor * patch, side * factor)
