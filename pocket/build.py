"""Build everything in `pocket/` from two npm packages: `python -m pocket.build` (under 3 hours on 2 cores).

Stages, each resumable: data -> vae -> reference -> scorers -> generator -> report.
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel, T5Tokenizer

from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.rewards.specs import RewardSpec
from diff_instruct.training.checkpoints import list_checkpoints
from pocket import data
from pocket.fit import fit


HERE = Path(__file__).parent
SCORERS = {
    "pocket": {"patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "pocket_heldout": {"patch_size": 16, "hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5},
}
GENERATOR_COMMAND = (
    "--pretrained_model_name_or_path pocket/reference --train_prompts pocket/prompts_train.txt "
    "--eval_prompts pocket/prompts_heldout.txt --reward pocket --heldout_reward pocket_heldout "
    "--pretrain_steps 1200 --max_train_steps 0 --pretrain_cfg_scale 4.5 --train_batch_size 32 --learning_rate 2e-4 "
    "--mixed_precision bf16 --validation_steps 200 --checkpointing_steps 100"
)


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
    """Give each latent channel mean 0 and deviation 1, exactly, by folding that into the two 1x1 convolutions."""
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
def encode_pictures(vae, work_dir, accelerator, variants=2):
    """Latent mean and std, (variants, 2, 2N, 8, 8, 8), of every picture: as it is, and moved or mirrored."""
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
    fit(
        "reference",
        networks,
        loss_fn,
        steps=11000,
        lr=8e-4,
        work_dir=work_dir,
        accelerator=accelerator,
        ema_decay=0.9995,
    )
    return transformer, text_encoder, tokenizer


def build_scorer(name, vision, seed, work_dir, accelerator):
    """A CLIPModel on pictures and captions; 10% of the pictures (one style of a caption) are left out, by `seed`."""
    pictures, captions = data.load(work_dir)
    tokenizer, may_flip = make_tokenizer(captions), flippable(captions)
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 24,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
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

    fit(name, [model], loss_fn, steps=700, lr=1e-3, work_dir=work_dir, accelerator=accelerator, seed=seed)
    return model, tokenizer, left_out


def export_reference(vae, transformer, text_encoder, tokenizer):
    """`pocket/reference`: a PixArtAlphaPipeline in half precision, with the sampler that PixArt-α ships with."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", num_train_timesteps=1000)
    pipe = PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipe.to(torch.float16).save_pretrained(HERE / "reference")


def load_pocket_reference():
    """The committed reference, in float32, as a stock pipeline."""
    pipe = PixArtAlphaPipeline.from_pretrained(str(HERE / "reference"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, guidance_scale, seed=0, steps=25):
    """Pixels (B, 3, 64, 64) in [0, 1] of the reference in many steps."""
    generator, images = torch.Generator().manual_seed(seed), []
    for i in range(0, len(prompts), 64):
        images.append(
            pipe(
                prompts[i : i + 64], guidance_scale=guidance_scale, num_inference_steps=steps, generator=generator,
                height=data.RESOLUTION, width=data.RESOLUTION, use_resolution_binning=False, clean_caption=False,
                output_type="pt", max_sequence_length=24,
            ).images
        )  # fmt: skip
    return torch.cat(images)


def export_scorer(name, model, tokenizer, captions):
    """A scorer in half precision; its reward is in units of its spread on unguided samples of the reference."""
    folder = HERE / {"pocket": "scorer", "pocket_heldout": "scorer_heldout"}[name]
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = random.Random(0).sample(captions["names"], 256)
    images = sample(load_pocket_reference(), prompts, guidance_scale=1.0)
    scorer = PocketReward.unscaled(folder)
    with torch.no_grad():
        cosine = scorer(images, prompts)
    scale = {"mean": round(cosine.mean().item(), 4), "std": round(cosine.std().item(), 4)}
    (folder / "reward.json").write_text(json.dumps(scale) + "\n")


def export_prompts(captions):
    """`prompts_train.txt` and `prompts_heldout.txt`, one prompt a line."""
    heldout = set(captions["heldout"])
    train = sorted({s for i, group in enumerate(captions["synonyms"]) if i not in heldout for s in group})
    (HERE / "prompts_train.txt").write_text("\n".join(train) + "\n")
    names = [captions["names"][i] for i in captions["heldout"]]
    (HERE / "prompts_heldout.txt").write_text("\n".join(names) + "\n")


def build_generator(work_dir):
    """`pocket/generator`: the one-step generator that this project's own pretrain stage distils from the reference."""
    out = Path(work_dir) / "generator"
    command = [
        "accelerate", "launch", "train_diff_instruct_pp.py", "--output_dir", str(out), *GENERATOR_COMMAND.split()
    ]  # fmt: skip
    if not (out / "training_summary.json").exists():
        resume = ["--resume_from_checkpoint", "latest"] if list_checkpoints(out) else []
        subprocess.run([*command, *resume], cwd=HERE.parent, check=True)
    pipe = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    pipe.transformer.to(torch.float16).save_pretrained(HERE / "generator" / "transformer")
    shutil.copyfile(out / "model_index.json", HERE / "generator" / "model_index.json")
    shutil.copyfile(out / "curves.png", HERE / "generator" / "curves.png")


@torch.no_grad()
def caption_features(scorer, captions):
    """The scorer's text features, by caption."""
    return dict(zip(captions, scorer.text_features(captions)))


@torch.no_grad()
def retrieved(scorer, images, prompts, text, n=100, seed=0):
    """For each image, whether the scorer ranks its own caption first among n of `caption_features`."""
    rng, hits = random.Random(seed), []
    for feature, prompt in zip(scorer.image_features(images), prompts):
        others = rng.sample([c for c in text if c != prompt], n - 1)
        scores = torch.stack([text[c] for c in [prompt, *others]]) @ feature
        hits.append(scores.argmax().item() == 0)
    return hits


def retrieval_rate(scorer, images, prompts, captions, **options):
    """The share of the images that are `retrieved` among `captions["names"]`."""
    hits = retrieved(scorer, images, prompts, caption_features(scorer, captions["names"]), **options)
    return sum(hits) / len(hits)


def report(work_dir, left_out):
    """`report.json` (retrieval among 100 captions), `samples.png` and `curves.png` of the reference."""
    pictures, captions = data.load(work_dir)
    pictures = pictures / 2 + 0.5
    heldout = [captions["names"][i] for i in captions["heldout"]]
    train = random.Random(1).sample(sorted(set(captions["names"]) - set(heldout)), 200)
    position = {name: i for i, name in enumerate(captions["names"])}
    pipe, figures = load_pocket_reference(), {}
    groups = {"training_captions": train, "heldout_captions": heldout}
    samples = {
        (group, g): sample(pipe, prompts, guidance_scale=g) for group, prompts in groups.items() for g in (1.0, 4.5)
    }
    for name in ("pocket", "pocket_heldout"):
        scorer, result = load_reward(RewardSpec(name)), {}
        for group, prompts in groups.items():
            real = torch.cat([pictures[2 * position[p] : 2 * position[p] + 2] for p in prompts])
            result[group] = {
                "real_pictures": retrieval_rate(scorer, real, [p for p in prompts for _ in range(2)], captions),
                **{
                    f"25_steps_guidance_{g}": retrieval_rate(scorer, samples[group, g], prompts, captions)
                    for g in (1.0, 4.5)
                },
            }
        names = [captions["names"][i // 2] for i in left_out[name]]
        result["real_pictures_it_was_not_trained_on"] = retrieval_rate(
            scorer, pictures[left_out[name]], names, captions
        )
        figures[name] = result
    (HERE / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    prompts = [*train[:56], *heldout[:40]]
    images = torch.cat([samples["training_captions", 4.5][:56], samples["heldout_captions", 4.5][:40]])
    grid = images.view(8, 12, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(8 * 64, 12 * 64, 3)
    Image.fromarray((grid * 255).round().byte().numpy()).save(HERE / "samples.png")
    (HERE / "samples.txt").write_text("\n".join(", ".join(prompts[i : i + 12]) for i in range(0, 96, 12)) + "\n")

    figure, axes = plt.subplots(1, 4, figsize=(14, 3), layout="constrained")
    for axis, name in zip(axes, ("vae", "reference", "pocket", "pocket_heldout")):
        with (Path(work_dir) / f"{name}.csv").open() as f:
            points = [(int(step), float(loss)) for step, loss, _ in csv.reader(f)]
        axis.plot(*zip(*points))
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(HERE / "curves.png", dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", default="pocket-build", help="where intermediate results go (about 1 GB)")
    work_dir = parser.parse_args().work_dir
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    data.prepare(work_dir)
    _, captions = data.load(work_dir)
    vae = build_vae(work_dir, accelerator)
    export_reference(vae, *build_reference(vae, work_dir, accelerator))
    left_out = {}
    for seed, (name, vision) in enumerate(SCORERS.items(), start=1):
        model, tokenizer, left_out[name] = build_scorer(name, vision, seed, work_dir, accelerator)
        export_scorer(name, model, tokenizer, captions)
    export_prompts(captions)
    report(work_dir, left_out)
    build_generator(work_dir)


if __name__ == "__main__":
    main()
