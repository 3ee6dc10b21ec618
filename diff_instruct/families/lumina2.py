# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0."""

from pipeline_one_step import ATTENTION, Family, masked_states


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
