from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3ForConditionalGeneration

from tests.families.parts import randomised, shifted, tiny_mistral3, vae_of, with_statistics


def tiny_flux2():
    """Its tokenizer is a processor's, which needs torchvision and does the same with text."""
    tokenizer, text_encoder = tiny_mistral3(Mistral3ForConditionalGeneration, layers=30, std=0.1)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = with_statistics(vae_of(4, cls=AutoencoderKLFlux2))
    return Flux2Pipeline(shifted(use_dynamic_shifting=True), vae, text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"Flux2Pipeline": tiny_flux2}
