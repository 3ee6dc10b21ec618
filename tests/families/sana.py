from diffusers import DPMSolverMultistepScheduler, SanaPipeline

from tests.families.parts import dc_vae, sana_transformer, tiny_gemma


def tiny_sana():
    tokenizer, text_encoder = tiny_gemma()
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return SanaPipeline(tokenizer, text_encoder, dc_vae(), sana_transformer(), scheduler)


PIPELINES = {"SanaPipeline": tiny_sana}
