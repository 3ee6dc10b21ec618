# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Image."""

import torch
from torch.nn.utils.rnn import pad_sequence

from diff_instruct.families.flux2_klein import Flux2Klein
from pipeline_one_step import ATTENTION, Family, device_of


class ErnieImage(Flux2Klein):
    """ERNIE-Image: a transformer over the tokens of image and prompt (Ministral's states), of which it is told how
    many there are, with the time in its own dtype; latents and VAE are FLUX.2's, normalised with an ε of its own.

    The stock's call takes no noise levels: they are given to its scheduler.
    """

    name = "ErnieImagePipeline"
    unused = ("pe", "pe_tokenizer")  # a language model that rewrites prompts
    options = {"use_pe": False}
    lora_targets = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2")
    max_sequence_length = None
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    apps = {
        "original": "",
        "encoder": ("CLIPLoader", "flux2", "ministral-3-3b.safetensors"),
        "latent": "EmptyFlux2LatentImage",
        "vae": "flux2-vae.safetensors",
        "stable_diffusion_cpp": "--llm ministral-3-3b.safetensors --vae flux2-vae.safetensors",
    }

    @staticmethod
    def encode_prompt(pipe, prompt):
        """Each prompt is encoded by itself, as the stock does: its tokenizer need not know of padding."""
        length = pipe.config.max_sequence_length
        options, states = {"truncation": True} | ({"max_length": length} if length else {}), []
        for p in prompt:
            tokens = torch.as_tensor(pipe.tokenizer([p], **options).input_ids, dtype=torch.long)
            if tokens.numel() == 0:
                tokens = torch.tensor([[pipe.tokenizer.bos_token_id or 0]])
            tokens = tokens.to(device_of(pipe.text_encoder))
            states.append(pipe.text_encoder(input_ids=tokens, output_hidden_states=True).hidden_states[-2][0])
        mask = [torch.ones(len(e), dtype=torch.long, device=e.device) for e in states]
        states, mask = (pad_sequence(rows, batch_first=True) for rows in (states, mask))
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        prompt = {
            "text_bth": c["encoder_hidden_states"].to(x_t.dtype),
            "text_lens": c["encoder_attention_mask"].sum(1),
        }
        return network(hidden_states=x_t, timestep=t.to(x_t.dtype), **prompt, return_dict=False)[0]

    @staticmethod
    def decode(pipe, x0):
        return Flux2Klein.decode(pipe, x0, eps=1e-5)

    tokens = staticmethod(Family.tokens)
    from_tokens = staticmethod(Family.from_tokens)

    @classmethod
    def from_stock_latents(cls, stock, latents, shape):
        return cls.from_tokens(latents, shape)  # it gives them as they are, klein the VAE's

    @classmethod
    def stock_setup(cls):
        return f"""\
from diffusers import FlowMatchEulerDiscreteScheduler
{super().stock_setup()}scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
stock.scheduler = scheduler
sigmas, set_timesteps = [t / pipe.schedule.steps for t in pipe.timesteps], scheduler.set_timesteps
scheduler.set_timesteps = lambda device=None, **_: set_timesteps(sigmas=sigmas, device=device)
"""

    @classmethod
    def stock_arguments(cls, pipe):
        return {"num_inference_steps": len(pipe.timesteps), **cls.unguided, **cls.options}
