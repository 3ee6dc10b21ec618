"""Tiny pipelines of the flow-matching families: real classes, random weights, images of 32×32 pixels, on disk."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import tiny_clip, tiny_tokenizer


SIDE = 32
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think></think>\n{% endif %}"
)


def randomised(network, std=0.1):
    """Its parameters drawn anew, the zero-initialised and constant parts, too, so that every input matters."""
    for name, p in network.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and p.ndim == 1 else 0.0, std=std)
    return network.eval()


def vae_of(channels, side_factor=2, cls=AutoencoderKL, **options):
    blocks = {2: 2, 8: 4}[side_factor]
    return cls(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, latent_channels=channels, norm_num_groups=4, sample_size=SIDE, **options,
    ).eval()  # fmt: skip


def tiny_t5():
    tokenizer = tiny_tokenizer()
    size = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **size)).eval()


def tiny_gemma():
    letters = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *letters])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    return tokenizer, randomised(Gemma2Model(config), 0.3)


def tiny_qwen_tokenizer():
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {w: len(vocab) + i for i, w in enumerate(special)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_qwen3(cls=Qwen3Model, layers=2):
    tokenizer = tiny_qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 4, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    return tokenizer, randomised(cls(config), 0.2)


def shifted(shift=3.0, **options):
    """As the published schedulers: they shift noise levels that are given, too."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


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


def dc_vae():
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.4,
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    ).eval()  # fmt: skip


def sana_transformer(**options):
    return randomised(SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16, **options,
    ))  # fmt: skip


def tiny_sana():
    tokenizer, text_encoder = tiny_gemma()
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return SanaPipeline(tokenizer, text_encoder, dc_vae(), sana_transformer(), scheduler)


def tiny_sana_sprint():
    tokenizer, text_encoder = tiny_gemma()
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return SanaSprintPipeline(tokenizer, text_encoder, dc_vae(), transformer, SCMScheduler())


def tiny_z_image():
    tokenizer, text_encoder = tiny_qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    vae = vae_of(4, scaling_factor=0.36, shift_factor=0.1)
    return ZImagePipeline(shifted(), vae, text_encoder, tokenizer, randomised(transformer))


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


def tiny_flux2_klein():
    tokenizer, text_encoder = tiny_qwen3(Qwen3ForCausalLM, layers=28)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = vae_of(4, cls=AutoencoderKLFlux2)
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        shifted(use_dynamic_shifting=True), vae, text_encoder, tokenizer, randomised(transformer)
    )


def tiny_qwen_image():
    tokenizer = tiny_qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 4, "max_position_embeddings": 2048}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = shifted(1.0, use_dynamic_shifting=True, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae.eval(), randomised(text_encoder, 0.2), tokenizer, randomised(transformer))


def tiny_lumina2():
    tokenizer, text_encoder = tiny_gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=2, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64), cap_feat_dim=16, multiple_of=16,
    )  # fmt: skip
    vae = vae_of(4, 8, scaling_factor=0.36, shift_factor=0.1)
    return Lumina2Pipeline(randomised(transformer), shifted(6.0), vae, text_encoder, tokenizer)


FLOW = {
    "StableDiffusion3Pipeline": tiny_sd3,
    "SanaPipeline": tiny_sana,
    "SanaSprintPipeline": tiny_sana_sprint,
    "ZImagePipeline": tiny_z_image,
    "FluxPipeline": tiny_flux,
    "schnell": tiny_flux_schnell,
    "Flux2KleinPipeline": tiny_flux2_klein,
    "QwenImagePipeline": tiny_qwen_image,
    "Lumina2Pipeline": tiny_lumina2,
}


def save_tiny_flow(name, folder, seed=0):
    """One of `FLOW`, saved in a folder; returns the folder."""
    torch.manual_seed(seed)
    FLOW[name]().save_pretrained(folder)
    return str(folder)
