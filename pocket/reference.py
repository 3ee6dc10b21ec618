"""Stage `reference`: a PixArt transformer from scratch, on latents and states of captions made once."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from pocket import world
from pocket.fit import fit


SCHEDULE = {"beta_schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


@torch.no_grad()
def make_latents(vae, pictures, work_dir, accelerator):
    """Mean and deviation, (M, 8, 12, 12) float16 each, of the posterior of every pair; zeros for those held out."""
    file = Path(work_dir) / "latents.safetensors"
    if not file.exists():
        size = (len(pictures.pairs), 8, 12, 12)
        mean, std = torch.zeros(size, dtype=torch.float16), torch.zeros(size, dtype=torch.float16)
        for index in (~pictures.heldout).nonzero()[:, 0].split(64):
            with accelerator.autocast():
                posterior = vae.encode(pictures.pixels(index).to(accelerator.device) * 2 - 1).latent_dist
            mean[index], std[index] = posterior.mean.half().cpu(), posterior.std.half().cpu()
        save_file({"mean": mean, "std": std}, file)
    tensors = load_file(file)
    return tensors["mean"], tensors["std"]


@torch.no_grad()
def caption_states(text_encoder, tokenizer, captions, batch=256):
    """The encoder's states (N, L, 128) and masks (N, L) of N captions, padded to the longest."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt").to(text_encoder.device)
    states = [
        text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        for ids, mask in zip(tokens.input_ids.split(batch), tokens.attention_mask.split(batch))
    ]
    return torch.cat(states), tokens.attention_mask


def build_reference(vae, text_encoder, tokenizer, pictures, work_dir, accelerator, steps):
    """A PixArtTransformer2DModel (36 tokens) after that many steps; 10% of the captions are "".

    It predicts v, with the weight min(snr + 1, 5) in terms of x0: the loss of ε with min-SNR-5 (Hang et al., arXiv
    2303.09556) hardly asks for what is decided where noise is strong, backgrounds and colours.
    """
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=40, num_layers=6, cross_attention_dim=240, caption_channels=128,
        in_channels=8, out_channels=16, sample_size=12, patch_size=2,
    )  # fmt: skip
    schedule = DDPMScheduler(**SCHEDULE)
    mean, std = make_latents(vae, pictures, work_dir, accelerator)
    captions, seen = pictures.captions(), (~pictures.heldout).nonzero()[:, 0]
    texts = ["", *pictures.captions_of(heldout=False)]
    states, masks = caption_states(text_encoder, tokenizer, texts)
    place = {text: k for k, text in enumerate(texts)}
    text_of = torch.tensor([place.get(caption, 0) for caption in captions])

    def loss_fn(generator, batch=64):
        i = seen[torch.randint(len(seen), (batch,), generator=generator)]
        noise = torch.randn(2, batch, *mean.shape[1:], generator=generator)
        x0 = mean[i].float() + std[i].float() * noise[0]
        t = torch.randint(1000, (batch,), generator=generator)
        c = torch.where(torch.rand(batch, generator=generator) < 0.1, 0, text_of[i])
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        x0, t, eps, c = (v[share].to(accelerator.device) for v in (x0, t, noise[1], c))
        one_and_snr = 1 / (1 - schedule.alphas_cumprod.to(t.device)[t]).view(-1, 1, 1, 1)
        longest = masks[c].sum(1).max()
        out = transformer(
            schedule.add_noise(x0, eps, t),
            encoder_hidden_states=states[c, :longest],
            encoder_attention_mask=masks[c, :longest],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()[:, :8]
        weight = one_and_snr.clamp(max=5) / one_and_snr
        return (weight * (out - schedule.get_velocity(x0, eps, t)) ** 2).mean()

    fit(
        "reference", [transformer], loss_fn, steps=steps, lr=8e-4, work_dir=work_dir, accelerator=accelerator,
        ema_decay=0.9995, hold=0.7,
    )  # fmt: skip
    return transformer


def as_pipeline(vae, text_encoder, tokenizer, transformer):
    """A PixArtAlphaPipeline with the sampler that PixArt-α ships with."""
    pipe = PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, DPMSolverMultistepScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, guidance_scale, seed=0, steps=25):
    """Pixels (B, 3, 48, 48) in [0, 1] of the reference in many steps."""
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
