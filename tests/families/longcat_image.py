from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

from tests.families.parts import randomised, shifted, tiny_qwen2_5_vl, vae_of


def tiny_longcat_image():
    tokenizer, text_encoder = tiny_qwen2_5_vl()
    transformer = LongCatImageTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    scheduler = shifted(1.0, use_dynamic_shifting=True)
    return LongCatImagePipeline(scheduler, vae, text_encoder, tokenizer, None, randomised(transformer))


PIPELINES = {"LongCatImagePipeline": tiny_longcat_image}
