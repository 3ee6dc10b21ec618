from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.families.parts import randomised, shifted, tiny_t5, vae_of
from tests.tiny import tiny_clip


def tiny_sd3():
    clips = [tiny_clip(CLIPTextModelWithProjection) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    tokenizer_3, text_encoder_3 = tiny_t5()
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer), scheduler=shifted(),
        vae=vae_of(4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clips[0][1], tokenizer=clips[0][0], text_encoder_2=clips[1][1], tokenizer_2=clips[1][0],
        text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip


PIPELINES = {"StableDiffusion3Pipeline": tiny_sd3}
