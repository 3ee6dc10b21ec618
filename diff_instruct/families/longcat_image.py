# SPDX-License-Identifier: Apache-2.0
"""LongCat-Image."""

import torch

from diff_instruct.families.flux import Flux
from pipeline_one_step import device_of, pack, positions, unpack


class LongCatImage(Flux):
    """LongCat-Image: a transformer over the tokens of image and prompt (Qwen2.5-VL's states of a chat, of the prompt
    alone, padding included); what is quoted in a prompt is read letter by letter."""

    name = "LongCatImagePipeline"
    unused = ("text_processor",)  # for a language model that rewrites prompts
    options = {"enable_prompt_rewrite": False, "enable_cfg_renorm": False}
    unguided = {"guidance_scale": 1.0}
    embedded_guidance = None
    apps = {
        **Flux.apps,
        "original": Flux.apps["original"].replace("_norm.scale", "_norm.weight")
        + """
time_in.in_layer = time_embed.timestep_embedder.linear_1
time_in.out_layer = time_embed.timestep_embedder.linear_2
""",
        "encoder": ("CLIPLoader", "longcat_image", "qwen_2.5_vl_7b.safetensors"),
        "stable_diffusion_cpp": "--llm qwen_2.5_vl_7b.safetensors --vae ae.safetensors",
    }
    conditions = {"encoder_hidden_states": "prompt_embeds"}
    before = (  # what the model was trained with
        "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image "
        "content, suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n"

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        def ids(text):
            return pipe.tokenizer(text, add_special_tokens=False)["input_ids"]

        length, before, after = pipe.config.max_sequence_length, ids(cls.before), ids(cls.after)
        parts = [
            [part for text, quoted in split_quotation(p) for part in (text if quoted else [text])] for p in prompt
        ]
        tokens = {"input_ids": [[i for part in row for i in ids(part)][:length] for row in parts]}
        tokens = pipe.tokenizer.pad(tokens, max_length=length, padding="max_length", return_tensors="pt")
        ends = [torch.tensor(end).expand(len(prompt), -1) for end in (before, after)]
        chat = torch.cat([ends[0], tokens.input_ids, ends[1]], dim=1)
        mask = torch.nn.functional.pad(tokens.attention_mask, (len(before), len(after)), value=1)
        chat, mask = (v.to(device_of(pipe.text_encoder)) for v in (chat, mask))
        states = pipe.text_encoder(input_ids=chat, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        return {"encoder_hidden_states": states[:, len(before) : -len(after)]}

    @classmethod
    def denoise(cls, pipe, network, x_t, t, c):
        c, device = c["encoder_hidden_states"].to(x_t.dtype), t.device
        place = positions(x_t.shape[2] // 2, x_t.shape[3] // 2, 3, device)
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c,
            txt_ids=torch.arange(c.shape[1], device=device)[:, None] * torch.tensor([0.0, 1.0, 1.0], device=device),
            img_ids=place + torch.tensor([1, cls.max_sequence_length, cls.max_sequence_length], device=device),
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": alpha, "negative_prompt": [""] * n}

    @classmethod
    def stock_arguments(cls, pipe):
        return super(Flux, cls).stock_arguments(pipe)
