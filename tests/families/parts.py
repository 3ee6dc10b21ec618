"""Parts of tiny pipelines: text encoders, VAEs, schedulers of the real classes with random weights."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlavaProcessor,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import tiny_tokenizer


SIDE = 32  # pixels
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>\n{% endif %}"
    "{% endif %}"
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


def tiny_qwen2_5_vl(layers=2):
    tokenizer = tiny_qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {**size, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 4, "max_position_embeddings": 2048}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, randomised(Qwen2_5_VLForConditionalGeneration(config), 0.2)


def tiny_qwen3_vl(cls, layers=2, std=0.2):
    tokenizer = tiny_qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return tokenizer, randomised(cls(config), std)


def tiny_mistral3(cls, layers=2, std=0.2):
    tokenizer = tiny_qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = {"model_type": "mistral", "num_hidden_layers": layers, "num_key_value_heads": 1, "sliding_window": None}
    vision = {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    config = Mistral3Config(
        text_config={**size, **text, "vocab_size": len(tokenizer) + 4, "max_position_embeddings": 2048},
        vision_config={**size, **vision},
    )
    return tokenizer, randomised(cls(config), std)


def with_statistics(vae):
    """FLUX.2's VAE, whose latents are normalised by what its batch normalisation has seen."""
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def processor_of(tokenizer):
    """Stands in for Qwen3-VL's, which needs torchvision, and does the same with text."""
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    template = {"chat_template": tokenizer.chat_template}
    return LlavaProcessor(CLIPImageProcessor(), tokenizer, image_token="<|image_pad|>", **template)


def qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
    ).eval()  # fmt: skip


def shifted(shift=3.0, **options):
    """As the published schedulers: they shift noise levels that are given, too."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


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
