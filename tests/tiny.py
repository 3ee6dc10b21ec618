"""Tiny networks of the real classes with random weights, on disk, and the arguments for a few steps with them."""

import json

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel, T5Tokenizer


WORDS = "a an the red blue green apple cat dog heart fire moon with and big small".split()
PROMPTS = [
    "a red apple",
    "blue cat",
    "the big dog with a heart",
    "green moon",
    "fire",
    "small red heart",
    "cat and dog",
]


def tiny_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + w, -1.0) for w in WORDS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


def tiny_pixart(folder, seed=0):
    """A PixArtAlphaPipeline of 16x16 pixels and (4, 8, 8) latents, about 60,000 parameters."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=16,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2,
    )  # fmt: skip
    for p in transformer.parameters():  # the zero-initialised parts, too, so that every input matters
        torch.nn.init.normal_(p, std=0.1)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
    PixArtAlphaPipeline(tokenizer, text_encoder.eval(), vae.eval(), transformer.eval(), scheduler).save_pretrained(
        folder
    )
    return str(folder)


def tiny_scorer(folder, seed=1):
    """A CLIPModel with its tokenizer and the scale of its reward."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "reward.json").write_text(json.dumps({"mean": 0.0, "std": 0.1}))
