from diffusers import SanaSprintPipeline, SCMScheduler

from tests.families.parts import dc_vae, sana_transformer, tiny_gemma


def tiny_sana_sprint():
    tokenizer, text_encoder = tiny_gemma()
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return SanaSprintPipeline(tokenizer, text_encoder, dc_vae(), transformer, SCMScheduler())


PIPELINES = {"SanaSprintPipeline": tiny_sana_sprint}
