from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tests.families.parts import SIDE, randomised, shifted, tiny_qwen2_5_vl


def tiny_hunyuan_image():
    tokenizer, text_encoder = tiny_qwen2_5_vl(layers=3)
    tokenizer_2 = ByT5Tokenizer()
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    text_encoder_2 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_2), **size))
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(8, 8),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=SIDE, scaling_factor=0.75,
    )  # fmt: skip
    return HunyuanImagePipeline(
        shifted(5.0), vae.eval(), text_encoder, tokenizer, randomised(text_encoder_2, 0.3), tokenizer_2,
        randomised(transformer), AdaptiveProjectedMixGuidance(), AdaptiveProjectedMixGuidance(),
    )  # fmt: skip


PIPELINES = {"HunyuanImagePipeline": tiny_hunyuan_image}
