from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from tests.families.parts import randomised, shifted, tiny_qwen2_5_vl


def tiny_qwen_image():
    tokenizer, text_encoder = tiny_qwen2_5_vl()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae.eval(), text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"QwenImagePipeline": tiny_qwen_image}
