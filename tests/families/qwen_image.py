from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from tests.families.parts import qwen_vae, randomised, shifted, tiny_qwen2_5_vl


def tiny_qwen_image():
    tokenizer, text_encoder = tiny_qwen2_5_vl()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, qwen_vae(), text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"QwenImagePipeline": tiny_qwen_image}
