from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.families.parts import randomised, shifted, vae_of
from tests.tiny import tiny_tokenizer


def tiny_aura_flow():
    tokenizer = tiny_tokenizer()
    size = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **size))
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=24 * 24,
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.5)
    parts = tokenizer, randomised(text_encoder, 0.3), vae, randomised(transformer, 0.3)
    return AuraFlowPipeline(*parts, shifted(1.73))


PIPELINES = {"AuraFlowPipeline": tiny_aura_flow}
