from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from tests.families.parts import randomised, shifted, tiny_gemma, vae_of


def tiny_lumina2():
    tokenizer, text_encoder = tiny_gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=2, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64), cap_feat_dim=16, multiple_of=16,
    )  # fmt: skip
    vae = vae_of(4, 8, scaling_factor=0.36, shift_factor=0.1)
    return Lumina2Pipeline(randomised(transformer), shifted(6.0), vae, text_encoder, tokenizer)


PIPELINES = {"Lumina2Pipeline": tiny_lumina2}
