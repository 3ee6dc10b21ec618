"""Tiny networks of the real classes with random weights, on disk, and the arguments for a few steps with them."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


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


def pixart(cls=PixArtAlphaPipeline):
    """A PixArtAlphaPipeline of 16x16 pixels and (4, 8, 8) latents, about 60,000 parameters."""
    tokenizer = tiny_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    vae = tiny_vae()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=16,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2,
    )  # fmt: skip
    for p in transformer.parameters():  # the zero-initialised parts, too, so that every input matters
        torch.nn.init.normal_(p, std=0.1)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
    return cls(tokenizer, text_encoder.eval(), vae.eval(), transformer.eval(), scheduler)


def tiny_pixart(folder, seed=0):
    return saved(pixart, folder, seed)


def saved(build, folder, seed):
    """A pipeline, built from this seed, in a folder; returns the folder."""
    torch.manual_seed(seed)
    build().save_pretrained(folder)
    return str(folder)


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip


def tiny_clip(cls=CLIPTextModel):
    """A CLIP tokenizer, one token a letter, and its text encoder."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=24)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tokenizer, cls(config).eval()


def tiny_unet(**options):
    """A UNet2DConditionModel for (4, 8, 8) latents, about 50,000 parameters."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return unet.eval()


def sd(prediction_type="epsilon"):
    """A StableDiffusionPipeline of 16x16 pixels; with "v_prediction" as Stable Diffusion 2.x."""
    tokenizer, text_encoder = tiny_clip()
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = PNDMScheduler(**schedule, prediction_type=prediction_type, skip_prk_steps=True, steps_offset=1)
    unet = tiny_unet(cross_attention_dim=16)
    return StableDiffusionPipeline(
        tiny_vae().eval(), text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def tiny_sd(folder, seed=0):
    return saved(sd, folder, seed)


def sd2():
    return sd("v_prediction")


def tiny_sd2(folder, seed=0):
    return saved(sd2, folder, seed)


def sdxl():
    """A StableDiffusionXLPipeline of 16x16 pixels."""
    tokenizer, text_encoder = tiny_clip()
    tokenizer_2, text_encoder_2 = tiny_clip(CLIPTextModelWithProjection)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    unet = tiny_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        tiny_vae().eval(), text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler
    )


def tiny_sdxl(folder, seed=0):
    return saved(sdxl, folder, seed)


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


def tiny_checkpoints(folder):
    """Entries of `--reward_checkpoint` that put the two scorers of the fixture `tiny_pocket` in the pocket's place."""
    return [f"pocket={folder / 'scorer'}", f"pocket_heldout={folder / 'scorer_heldout'}"]
