# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0."""

from pipeline_one_step import ATTENTION, Family, masked_states


ORIGINAL = """
cap_embedder.0 = time_caption_embed.caption_embedder.0
cap_embedder.1 = time_caption_embed.caption_embedder.1
t_embedder.mlp.0 = time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_caption_embed.timestep_embedder.linear_2
final_layer.adaLN_modulation.1 = norm_out.linear_1
final_layer.linear = norm_out.linear_2
""" + "".join(
    f"""
{blocks}.* = {blocks}.*:
    attention.qkv = attn.to_q attn.to_k attn.to_v
    attention.q_norm = attn.norm_q
    attention.k_norm = attn.norm_k
    attention.out = attn.to_out.0
    feed_forward.w1 = feed_forward.linear_1
    feed_forward.w2 = feed_forward.linear_2
    feed_forward.w3 = feed_forward.linear_3
    attention_norm1 = {norm}
    attention_norm2 = norm2
    adaLN_modulation.1 = norm1.linear
"""
    for blocks, norm in (("context_refiner", "norm1"), ("noise_refiner", "norm1.norm"), ("layers", "norm1.norm"))
)  # layers, see `diff_instruct/export/original.py`


class Lumina2(Family):
    """Lumina-Image 2.0: a transformer over the tokens of image and prompt (Gemma's states); x0 − ε, time runs up."""

    name = "Lumina2Pipeline"
    options = {"cfg_normalization": False}  # the reference's guidance is the one that is trained against
    lora_targets = (*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    instruction = (  # what the model was trained with
        "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
        "based on textual prompts or user prompts. <Prompt Start> "
    )
    apps = {
        "original": ORIGINAL,
        "original_lora": True,
        "architecture": "lumina2",
        "encoder": ("CLIPLoader", "lumina2", "gemma_2_2b_fp16.safetensors"),
        "latent": "EmptySD3LatentImage",
        "vae": "ae.safetensors",
        "prompt": instruction + "{}",
    }

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        return masked_states(pipe, [cls.instruction + p for p in prompt])

    @classmethod
    def encode_null(cls, pipe):
        return masked_states(pipe, [""])  # without the instruction

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        mask, c = c["encoder_attention_mask"], c["encoder_hidden_states"].to(x_t.dtype)
        time, masked = 1 - t / pipe.schedule.steps, {"encoder_hidden_states": c, "encoder_attention_mask": mask}
        return -network(hidden_states=x_t, timestep=time, **masked, return_dict=False)[0]
