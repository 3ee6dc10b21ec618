"""Stage `vae`: an AutoencoderKL of factor 4 from scratch, 48×48×3 to 12×12×8."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from pocket import world
from pocket.fit import fit


def batch_of_pixels(pictures, size, generator):
    """Random pictures in [-1, 1], (size, 3, 48, 48), mirrored and moved by up to the margin (which is plain)."""
    x = pictures.pixels(torch.randint(len(pictures.pairs), (size,), generator=generator)) * 2 - 1
    flip = torch.rand(size, generator=generator) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    down, right = torch.randint(-world.MARGIN, world.MARGIN + 1, (2,), generator=generator).tolist()
    return torch.roll(x, (down, right), (2, 3)).contiguous()


def picture_loss(y, x):
    """L1 + L2 + L1 of the differences between neighbours, which keeps edges sharp."""
    across = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    return F.mse_loss(y, x) + 0.5 * F.l1_loss(y, x) + 0.5 * across


@torch.no_grad()
def whiten_latents(vae, pictures, accelerator):
    """Give each latent channel mean 0 and deviation 1, exactly, by folding that into the two 1x1 convolutions."""
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(32):
        x = batch_of_pixels(pictures, 32, generator).to(accelerator.device)
        means.append(vae.encode(x).latent_dist.mode())
    means = torch.cat(means)
    shift, scale = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    enc, dec, n = vae.quant_conv, vae.post_quant_conv, len(shift)
    dec.bias += dec.weight[:, :, 0, 0] @ shift
    dec.weight *= scale.view(1, n, 1, 1)
    enc.weight[:n] /= scale.view(n, 1, 1, 1)
    enc.bias[:n] = (enc.bias[:n] - shift) / scale
    enc.bias[n:] -= 2 * scale.log()
    vae.register_to_config(scaling_factor=1.0)


def build_vae(pictures, work_dir, accelerator, steps):
    """The whole autoencoder, with a slight KL; its latents have mean 0 and deviation 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        latent_channels=8,
        sample_size=world.RESOLUTION,
        norm_num_groups=16,
    )
    torch.nn.init.constant_(vae.quant_conv.bias[8:], -6.0)  # log variance: else noise drowns the latents at first

    def loss_fn(generator, batch=8):
        x = batch_of_pixels(pictures, batch, generator).to(accelerator.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return picture_loss(y, x) + 1e-4 * kl

    fit("vae", [vae], loss_fn, steps=steps, lr=1e-3, work_dir=work_dir, accelerator=accelerator)
    whiten_latents(vae, pictures, accelerator)
    return vae


@torch.no_grad()
def reconstruction_error(vae, pictures, accelerator, n=512):
    """Mean squared error of the posterior's mode decoded, in the range [-1, 1]."""
    generator, errors = torch.Generator().manual_seed(1), []
    for _ in range(n // 32):
        x = batch_of_pixels(pictures, 32, generator).to(accelerator.device)
        errors.append(F.mse_loss(vae.decode(vae.encode(x).latent_dist.mode()).sample, x))
    return torch.stack(errors).mean().item()
