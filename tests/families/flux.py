from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.families.parts import randomised, shifted, tiny_t5, vae_of
from tests.tiny import tiny_clip


def tiny_flux(guidance_embeds=True):
    tokenizer, text_encoder = tiny_clip(CLIPTextModel)
    tokenizer_2, text_encoder_2 = tiny_t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    scheduler = shifted(use_dynamic_shifting=True) if guidance_embeds else shifted(1.0)
    parts = text_encoder, tokenizer, text_encoder_2, tokenizer_2
    return FluxPipeline(scheduler, vae, *parts, randomised(transformer))


def tiny_flux_schnell():
    return tiny_flux(guidance_embeds=False)


PIPELINES = {"FluxPipeline": tiny_flux, "schnell": tiny_flux_schnell}
