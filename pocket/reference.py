"""Stage `reference`: a PixArt transformer and its T5 encoder from scratch, on latents made once."""

import random
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pocket import world
from pocket.fit import fit


BETAS = {"beta_schedule": "linear", "num_train_timesteps": 1000}


def make_tokenizer():
    """A word is a token; a word that no caption has is `<unk>`."""
    words = {w for noun in world.NOUNS for w in noun.split()} | {*world.HUES, *world.BACKGROUNDS}
    words |= {"a", "an", "on", "background"}
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + w, -1.0) for w in sorted(words)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


@torch.no_grad()
def make_latents(vae, pictures, work_dir, accelerator):
    """Mean and deviation, (M, 4, 16, 16) float16 each, of the posterior of every pair; zeros for those held out."""
    file = Path(work_dir) / "latents.safetensors"
    if not file.exists():
        size = (len(pictures.pairs), 4, 16, 16)
        mean, std = torch.zeros(size, dtype=torch.float16), torch.zeros(size, dtype=torch.float16)
        for index in (~pictures.heldout).nonzero()[:, 0].split(64):
            with accelerator.autocast():
                posterior = vae.encode(pictures.pixels(index).to(accelerator.device) * 2 - 1).latent_dist
            mean[index], std[index] = posterior.mean.half().cpu(), posterior.std.half().cpu()
        save_file({"mean": mean, "std": std}, file)
    tensors = load_file(file)
    return tensors["mean"], tensors["std"]


def build_reference(vae, pictures, work_dir, accelerator, steps):
    """PixArtTransformer2DModel (64 tokens) and T5 encoder: epsilon loss, min-SNR-5, 10% of captions dropped to ""."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=40, num_layers=6, cross_attention_dim=240, caption_channels=128,
        in_channels=4, out_channels=8, sample_size=16, patch_size=2,
    )  # fmt: skip
    alphas_cumprod = DDPMScheduler(**BETAS).alphas_cumprod.to(accelerator.device)
    mean, std = make_latents(vae, pictures, work_dir, accelerator)
    captions, seen = pictures.captions(), (~pictures.heldout).nonzero()[:, 0]

    def loss_fn(generator, batch=48):
        i = seen[torch.randint(len(seen), (batch,), generator=generator)]
        noise = torch.randn(2, batch, 4, 16, 16, generator=generator)
        x0 = mean[i].float() + std[i].float() * noise[0]
        t = torch.randint(1000, (batch,), generator=generator)
        rng = random.Random(torch.randint(2**31, (1,), generator=generator).item())
        texts = ["" if rng.random() < 0.1 else captions[k] for k in i]
        x0, t, eps = x0.to(accelerator.device), t.to(accelerator.device), noise[1].to(accelerator.device)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
        out = transformer(
            a.sqrt() * x0 + (1 - a).sqrt() * eps,
            encoder_hidden_states=text_encoder(**tokens).last_hidden_state,
            encoder_attention_mask=tokens.attention_mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()[:, :4]
        snr = a / (1 - a)
        return (snr.clamp(max=5) / snr * (out - eps) ** 2).mean()

    fit(
        "reference", [transformer, text_encoder], loss_fn, steps=steps, lr=8e-4, work_dir=work_dir,
        accelerator=accelerator, ema_decay=0.9995, hold=0.8,
    )  # fmt: skip
    return transformer, text_encoder, tokenizer


def as_pipeline(vae, transformer, text_encoder, tokenizer):
    """A PixArtAlphaPipeline with the sampler that PixArt-α ships with."""
    pipe = PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, DPMSolverMultistepScheduler(**BETAS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, guidance_scale, seed=0, steps=25):
    """Pixels (B, 3, 64, 64) in [0, 1] of the reference in many steps."""
    generator, images = torch.Generator().manual_seed(seed), []
    for i in range(0, len(prompts), 64):
        images.append(
            pipe(
                prompts[i : i + 64], guidance_scale=guidance_scale, num_inference_steps=steps, generator=generator,
                height=world.RESOLUTION, width=world.RESOLUTION, use_resolution_binning=False, clean_caption=False,
                output_type="pt", max_sequence_length=24,
            ).images
        )  # fmt: skip
    return torch.cat(images).float().cpu()
