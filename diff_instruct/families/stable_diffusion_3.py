# SPDX-License-Identifier: Apache-2.0
"""SD3 and 3.5."""

import torch

from pipeline_one_step import CONTEXT_FEED_FORWARD, FEED_FORWARD, JOINT_ATTENTION, Family, tokenize


class StableDiffusion3(Family):
    """SD3 and 3.5: a transformer that attends to the states of two CLIPs and of T5, padding included; pooled CLIPs."""

    name = "StableDiffusion3Pipeline"
    optional = ("text_encoder_3",)
    unused = ("feature_extractor", "image_encoder")
    lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, *CONTEXT_FEED_FORWARD)
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
