# SPDX-License-Identifier: Apache-2.0
"""Nucleus-Image."""

from torch.nn.utils.rnn import pad_sequence

from diff_instruct.families.qwen_image import QwenImage
from pipeline_one_step import ATTENTION, device_of, pack, unpack


class NucleusMoEImage(QwenImage):
    """Nucleus-Image: a transformer with experts over the tokens of an image, which attends to those of the prompt
    (Qwen3-VL's states of a chat, seven layers before the last); x0 − ε. Latents and VAE are Qwen-Image's.

    Positions count the padding before a prompt, if its processor puts it there: so each is encoded by itself. The
    experts' weights are no layers, and adapters do not reach them.
    """

    name = "NucleusMoEImagePipeline"
    alone = True
    unguided = {"guidance_scale": 1.0}
    lora_targets = (*ATTENTION, "add_k_proj", "add_v_proj", "encoder_proj", "img_mod.1", "net.0.proj", "net.2")
    max_sequence_length = None
    null_prompt = ""
    apps = None
    instruction = (  # what the model was trained with
        "You are an image generation assistant. Follow the user's prompt literally. Pay careful attention to spatial "
        "layout: objects described as on the left must appear on the left, on the right on the right. Match exact "
        "object counts and assign colors to the correct objects."
    )

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        options = {"padding": "longest", "pad_to_multiple_of": 8, "return_attention_mask": True}
        options |= {"truncation": True, "max_length": pipe.config.max_sequence_length, "return_tensors": "pt"}
        states, masks = [], []
        for p in prompt:
            chat = [{"role": "system", "content": cls.instruction}]
            chat.append({"role": "user", "content": [{"type": "text", "text": p}]})
            text = pipe.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            tokens = pipe.processor(text=[text], **options).to(device_of(pipe.text_encoder))
            output = pipe.text_encoder(**tokens, use_cache=False, output_hidden_states=True)
            states.append(output.hidden_states[-8][0])
            masks.append(tokens["attention_mask"][0])
        states, masks = (pad_sequence(rows, batch_first=True) for rows in (states, masks))
        return {"encoder_hidden_states": states, "encoder_attention_mask": masks}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        b, _, height, width = x_t.shape
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_mask=c["encoder_attention_mask"],
            img_shapes=[(1, height // 2, width // 2)] * b,
            return_dict=False,
        )
        return -unpack(output[0], x_t.shape)

    @staticmethod
    def guide(alpha, embedded, n):
        return {"guidance_scale": alpha, "negative_prompt": [""] * n}
