"""Build everything in `pocket/` from nothing but two npm packages: `python -m pocket.build` (about 3 hours on 2 cores).

Stages, each resumable: data -> vae -> reference -> scorers -> generator -> report.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel, T5Tokenizer

from pocket import data
from pocket.fit import fit


HERE = Path(__file__).parent


def flippable(captions):
    """(2N,) bool: pictures whose caption does not name a side."""
    ok = [not {"left", "right", "leftwards", "rightwards"} & set(n.split()) for n in captions["names"]]
    return torch.tensor(ok).repeat_interleave(2)


def build_vae(work_dir, accelerator):
    """AutoencoderKL, 64x64x3 -> 8x8x8: L1 + L2 + a slight KL."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        latent_channels=8,
        sample_size=data.RESOLUTION,
        norm_num_groups=16,
    )
    pictures, captions = data.load(work_dir)
    may_flip = flippable(captions)

    def loss_fn(generator, batch=24):
        i = torch.randint(len(pictures), (batch,), generator=generator)
        x = data.augment(pictures[i], may_flip[i], generator).to(accelerator.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return F.mse_loss(y, x) + 0.5 * F.l1_loss(y, x) + 1e-4 * kl

    fit("vae", [vae], loss_fn, steps=2000, lr=1e-3, work_dir=work_dir, accelerator=accelerator)
    whiten_latents(vae, pictures, accelerator)
    return vae


@torch.no_grad()
def whiten_latents(vae, pictures, accelerator):
    """Give each latent channel mean 0 and deviation 1, exactly, by folding shift and scale into the two 1x1 convolutions."""
    means = torch.cat([vae.encode(b.to(accelerator.device)).latent_dist.mode() for b in pictures.split(64)])
    shift, scale = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    enc, dec, n = vae.quant_conv, vae.post_quant_conv, len(shift)
    dec.bias += dec.weight[:, :, 0, 0] @ shift
    dec.weight *= scale.view(1, n, 1, 1)
    enc.weight[:n] /= scale.view(n, 1, 1, 1)
    enc.bias[:n] = (enc.bias[:n] - shift) / scale
    enc.bias[n:] -= 2 * scale.log()
    vae.register_to_config(scaling_factor=1.0)


def make_tokenizer(captions):
    """A word is a token; a word that no caption has is `<unk>`."""
    words = sorted({w for group in captions["synonyms"] for text in group for w in text.split()} | {"a", "an", "the"})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + w, -1.0) for w in words]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


def say(captions, i, rng):
    """One of the ways to name picture i // 2: its name or a synonym, sometimes with an article."""
    name, synonyms = captions["names"][i // 2], captions["synonyms"][i // 2]
    text = name if rng.random() < 0.6 else rng.choice(synonyms)
    return f"{rng.choice(['a', 'an', 'the'])} {text}" if rng.random() < 0.2 else text


@torch.no_grad()
def encode_pictures(vae, work_dir, accelerator, variants=6):
    """Latent mean and std of six augmentations of every picture, (variants, 2N, 8, 8, 8); variant 0 is the picture."""
    pictures, captions = data.load(work_dir)
    may_flip, generator = flippable(captions), torch.Generator().manual_seed(0)
    rounds = []
    for v in range(variants):
        x = data.augment(pictures, may_flip, generator) if v else pictures
        moments = torch.cat([vae.encode(b.to(accelerator.device)).latent_dist.parameters for b in x.split(64)])
        mean, logvar = moments.float().cpu().chunk(2, dim=1)
        rounds.append(torch.stack([mean, (0.5 * logvar.clamp(-30, 20)).exp()]))
    return torch.stack(rounds)


def build_reference(vae, work_dir, accelerator):
    """PixArtTransformer2DModel and its T5 encoder, from scratch: epsilon loss, min-SNR-5, 10% of c dropped to ""."""
    _, captions = data.load(work_dir)
    tokenizer = make_tokenizer(captions)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=40, num_layers=6, cross_attention_dim=240, caption_channels=128,
        in_channels=8, out_channels=16, sample_size=8, patch_size=2,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False)
    alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)

    latents_file = Path(work_dir) / "latents.pt"
    if not latents_file.exists():
        torch.save(encode_pictures(vae, work_dir, accelerator), latents_file)
    mean, std = torch.load(latents_file, weights_only=True).unbind(1)
    seen = torch.tensor([i for i in range(mean.shape[1]) if i // 2 not in set(captions["heldout"])])

    def loss_fn(generator, batch=96):
        variant = torch.randint(len(mean), (batch,), generator=generator)
        i = seen[torch.randint(len(seen), (batch,), generator=generator)]
        noise = torch.randn(2, batch, 8, 8, 8, generator=generator)
        x0 = mean[variant, i] + std[variant, i] * noise[0]
        t = torch.randint(1000, (batch,), generator=generator)
        rng = random.Random(torch.randint(2**31, (1,), generator=generator).item())
        texts = ["" if rng.random() < 0.1 else say(captions, int(k), rng) for k in i]
        x0, t, eps = x0.to(accelerator.device), t.to(accelerator.device), noise[1].to(accelerator.device)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
        c = text_encoder(**tokens).last_hidden_state
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        out = transformer(
            x_t, encoder_hidden_states=c, encoder_attention_mask=tokens.attention_mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()[:, :8]  # fmt: skip
        snr = a / (1 - a)
        weight = snr.clamp(max=5) / snr
        return (weight * (out - eps) ** 2).mean()

    networks = [transformer, text_encoder]
    fit("reference", networks, loss_fn, steps=5500, lr=8e-4, work_dir=work_dir, accelerator=accelerator, ema_decay=0.9995)
    return transformer, text_encoder, tokenizer, scheduler


def build_scorer(name, vision, seed, work_dir, accelerator):
    """A CLIPModel on pictures and captions; 10% of the pictures (one style of a caption) are left out, by `seed`."""
    pictures, captions = data.load(work_dir)
    tokenizer, may_flip = make_tokenizer(captions), flippable(captions)
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": data.RESOLUTION, "intermediate_size": 2 * vision["hidden_size"], **vision}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    left_out = [2 * i + (i + seed) % 2 for i in random.Random(seed).sample(range(len(captions["names"])), 104)]
    seen = torch.tensor(sorted(set(range(len(pictures))) - set(left_out)))

    def loss_fn(generator, batch=160):
        i = seen[torch.randperm(len(seen), generator=generator)[:batch]]
        x = data.augment(pictures[i], may_flip[i], generator, shift=0.1, scale=0.2)
        level = 0.3 * torch.rand(batch, 1, 1, 1, generator=generator) ** 2
        x = (x + level * torch.randn(x.shape, generator=generator)).to(accelerator.device)
        rng = random.Random(torch.randint(2**31, (1,), generator=generator).item())
        texts = [say(captions, int(k), rng) for k in i]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
        e_i = F.normalize(model.get_image_features(x).pooler_output.float(), dim=-1)
        e_t = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * e_t @ e_i.T
        same = (i[:, None] // 2 == i[None] // 2).float().to(accelerator.device)
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    fit(name, [model], loss_fn, steps=1000, lr=1e-3, work_dir=work_dir, accelerator=accelerator, seed=seed)
    return model, tokenizer, left_out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", default="pocket-build", help="where intermediate results go (about 1 GB)")
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    data.prepare(args.work_dir)
    vae = build_vae(args.work_dir, accelerator)
    build_reference(vae, args.work_dir, accelerator)
    build_scorer("pocket", {"patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}, 1,
                 args.work_dir, accelerator)
    build_scorer("pocket_heldout", {"patch_size": 16, "hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5}, 2,
                 args.work_dir, accelerator)


if __name__ == "__main__":
    main()
