from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

from tests.families.parts import randomised, shifted, tiny_qwen3, vae_of


def tiny_ovis_image():
    tokenizer, text_encoder = tiny_qwen3()
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    return OvisImagePipeline(shifted(use_dynamic_shifting=True), vae, text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"OvisImagePipeline": tiny_ovis_image}
