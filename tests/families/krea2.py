from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLModel

from tests.families.parts import qwen_vae, randomised, shifted, tiny_qwen3_vl


def tiny_krea2():
    tokenizer, text_encoder = tiny_qwen3_vl(Qwen3VLModel, layers=36, std=0.1)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True)
    return Krea2Pipeline(scheduler, qwen_vae(), text_encoder, tokenizer, randomised(transformer))


PIPELINES = {"Krea2Pipeline": tiny_krea2}
