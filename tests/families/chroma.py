from diffusers import ChromaPipeline, ChromaTransformer2DModel

from tests.families.parts import randomised, shifted, tiny_t5, vae_of


def tiny_chroma():
    tokenizer, text_encoder = tiny_t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    return ChromaPipeline(shifted(use_dynamic_shifting=True), vae, text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"ChromaPipeline": tiny_chroma}
