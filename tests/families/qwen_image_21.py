from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from transformers import Qwen3VLForConditionalGeneration

from tests.families.parts import processor_of, randomised, shifted, tiny_qwen3_vl


def tiny_qwen_image_21():
    tokenizer, text_encoder = tiny_qwen3_vl(Qwen3VLForConditionalGeneration)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.8, 1.1]
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1, latents_mean=mean,
        latents_std=std,
    )  # fmt: skip
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True)
    return QwenImage21Pipeline(scheduler, vae.eval(), text_encoder, processor_of(tokenizer), randomised(transformer))


PIPELINES = {"QwenImage21Pipeline": tiny_qwen_image_21}
