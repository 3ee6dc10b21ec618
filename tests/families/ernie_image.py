from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel
from transformers import Mistral3Model

from tests.families.parts import randomised, shifted, tiny_mistral3, vae_of, with_statistics


def tiny_ernie_image():
    tokenizer, text_encoder = tiny_mistral3(Mistral3Model)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = with_statistics(vae_of(4, cls=AutoencoderKLFlux2))
    return ErnieImagePipeline(randomised(transformer), vae, text_encoder, tokenizer, shifted())


PIPELINES = {"ErnieImagePipeline": tiny_ernie_image}
