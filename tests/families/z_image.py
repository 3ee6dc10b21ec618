from diffusers import ZImagePipeline, ZImageTransformer2DModel

from tests.families.parts import randomised, shifted, tiny_qwen3, vae_of


def tiny_z_image():
    tokenizer, text_encoder = tiny_qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    return ZImagePipeline(shifted(), vae, text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"ZImagePipeline": tiny_z_image}
