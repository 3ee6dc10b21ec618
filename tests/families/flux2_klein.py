from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from tests.families.parts import randomised, shifted, tiny_qwen3, vae_of, with_statistics


def tiny_flux2_klein():
    tokenizer, text_encoder = tiny_qwen3(Qwen3ForCausalLM, layers=28)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = with_statistics(vae_of(4, cls=AutoencoderKLFlux2))
    return Flux2KleinPipeline(
        shifted(use_dynamic_shifting=True), vae, text_encoder, tokenizer, randomised(transformer)
    )


PIPELINES = {"Flux2KleinPipeline": tiny_flux2_klein}
