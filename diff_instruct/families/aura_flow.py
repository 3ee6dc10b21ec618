# SPDX-License-Identifier: Apache-2.0
"""AuraFlow."""

from pipeline_one_step import JOINT_ATTENTION, Family, Grid, tokenize


class AuraFlow(Family):
    """AuraFlow: a transformer over the tokens of image and prompt (T5's states; padding is zero and attended to)."""

    name = "AuraFlowPipeline"
    lora_targets = (*JOINT_ATTENTION, "linear_1", "linear_2", "out_projection")
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
