from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel
from transformers import Qwen3VLForConditionalGeneration

from tests.families.parts import processor_of, qwen_vae, randomised, shifted, tiny_qwen3_vl


def tiny_nucleus_moe_image():
    tokenizer, text_encoder = tiny_qwen3_vl(Qwen3VLForConditionalGeneration, layers=8)
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(4, 6, 6), mlp_ratio=6.0, num_experts=4,
        dense_moe_strategy="leave_first_block_dense", moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True)
    processor = processor_of(tokenizer)
    return NucleusMoEImagePipeline(randomised(transformer), scheduler, qwen_vae(), text_encoder, processor)


PIPELINES = {"NucleusMoEImagePipeline": tiny_nucleus_moe_image}
