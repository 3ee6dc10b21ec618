"""The reference on its own: what it guides away from, and what it draws in many steps with its own sampler."""

import torch


def encode_null(family, stock, pipe, encode):
    """∅, one row: that of the stock pipeline, or zeros where the reference was trained so (SDXL)."""
    c = encode.null(pipe.encode_null)
    zeros = stock.config.get("force_zeros_for_empty_prompt", False)
    return {k: torch.zeros_like(v) if zeros else v for k, v in c.items()}


@torch.no_grad()
def sample(
    models, stock, prompts, z, steps, cfg_scale, size, num_images=1, generator=None, output_type="pt", **options
):
    """Pixels (B·n, 3, H, W) in [0, 1] of the stock pipeline with its own sampler.

    Args:
        models ([`Models`]): family and embedded guidance of the reference.
        z (`torch.Tensor`, (B·n, C, h, w)): unit noise, n images of each of B prompts one after the other.
        cfg_scale: α_cfg, guidance as ∅ + α (c − ∅); of a network that has guidance as an input and no ∅: that one.
        size: (height, width), pixels.
        generator: of the noise that the sampler wants later.
        output_type: "pt", or "latent" for latents in the form in which the stock's sampler holds them.
        options: further arguments of the stock pipeline.
    """
    stock.set_progress_bar_config(disable=True)
    family, embedded = models.family, models.embedded_guidance
    if embedded is None:
        embedded = family.embedded_guidance
    z, prompts = z.to(getattr(stock, family.denoiser).dtype), [p for p in prompts for _ in range(num_images)]
    height, width = size
    family.set_guidance(stock, cfg_scale)
    if family.alone and len(prompts) > 1:
        own = generator if isinstance(generator, list) else [generator] * len(prompts)
        rest = steps, cfg_scale, size, 1
        return torch.cat(
            [
                sample(models, stock, [p], z[i : i + 1], *rest, own[i], output_type, **options)
                for i, p in enumerate(prompts)
            ]
        )
    images = stock(
        prompt=prompts,
        latents=family.stock_latents(z),
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=generator,
        output_type=output_type,
        **family.guide(cfg_scale, embedded, len(prompts)),
        **family.options,
        **options,
    ).images.float()
    return images if output_type == "latent" else family.opaque(images)


def sample_latents(models, stock, prompts, z, steps, cfg_scale, size, generator=None):
    """x0 (B, C, h, w), float32, that the stock pipeline makes of unit noise z like it; the rest as in [`sample`]."""
    x0 = sample(models, stock, prompts, z, steps, cfg_scale, size, 1, generator, output_type="latent")
    return models.family.from_stock_latents(stock, x0, z.shape)
