"""The forward process x_t = α_t x0 + σ_t ε, and the conversions between what a network may predict."""

import torch

from pipeline_one_step import predict_x0


class NoiseSchedule:
    """A variance-preserving schedule (SD, SDXL, PixArt): α_t² = ᾱ_t, σ_t² = 1 − ᾱ_t, t = 0 .. T − 1.

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod`; its config gives T and the prediction type.
    """

    def __init__(self, scheduler, device="cpu"):
        alphas_cumprod = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.prediction_type = scheduler.config.prediction_type

    def __call__(self, t):
        """α_t and σ_t, each (B, 1, 1, 1), of integer timesteps t (B,)."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def timesteps(self, u, low, high):
        """π(t): t uniform on the integers of [low·T, high·T], both ends included, from u ~ U[0, 1), (B,)."""
        steps = len(self.alphas)
        first, last = round(low * steps), min(round(high * steps), steps - 1)
        return first + (u * (last - first + 1)).long().to(self.alphas.device)

    def add_noise(self, x0, eps, t):
        """x_t = α_t x0 + σ_t ε, all (B, C, H, W)."""
        alpha, sigma = self(t)
        return alpha * x0 + sigma * eps

    def x0(self, output, x_t, t):
        """Network output to x̂0, (B, C, H, W), float32."""
        return predict_x0(output, x_t, *self(t), self.prediction_type)

    def epsilon(self, output, x_t, t):
        """Network output to ε̂ = (x_t − α x̂0) / σ, (B, C, H, W), float32."""
        if self.prediction_type == "epsilon":
            return output.float()
        alpha, sigma = self(t)
        return (x_t.float() - alpha * self.x0(output, x_t, t)) / sigma
