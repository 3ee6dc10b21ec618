"""What rewards that are only numbers share: pictures as others want them, and a look at what comes back."""

import numpy as np
import torch
from PIL import Image

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.pixels import full_precision


class NoScores(Mistake):
    """A judge that had been asked for scores gave none: it does not answer, fails, or gives something else.

    On the command line it is a mistake like others; a run that is under way writes a checkpoint before it ends.
    """


def pictures_of(pixels):
    """A list of RGB pictures of PIL, 8 bits, of pixels (B, 3, H, W) in [0, 1]."""
    pixels = (full_precision(pixels.detach()).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pixels_of(pictures, device="cpu"):
    """Pixels (B, 3, H, W) in [0, 1] of pictures of PIL, all of one size."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) / 255


def scores_of(answer, n, spec, device):
    """n scores, (n,): of a tensor in full precision with its gradient, of a list or an array of numbers in float32.

    Numbers that are not finite are taken as they are: see [`NonFinite`].

    Raises:
        NoScores: for anything else, in one line.
    """
    if not isinstance(answer, torch.Tensor):
        kind = type(answer).__name__
        try:
            values = np.asarray(answer)
        except (ValueError, TypeError, RuntimeError):  # lists of unequal lengths; tensors that are not plain numbers
            values = np.empty(0, dtype=object)
        if values.dtype.kind not in "biuf":
            raise NoScores(f"reward `{spec}` returned {kind} of something else than numbers; {wanted(n)}")
        answer = torch.as_tensor(values, dtype=torch.float32, device=device)
    if tuple(answer.shape) != (n,):
        raise NoScores(f"reward `{spec}` returned shape {tuple(answer.shape)}; {wanted(n)}")
    return full_precision(answer)


def wanted(n, gradient=False):
    """What is right, in words."""
    if not gradient:
        return f"it must return a tensor of shape ({n},) or a list of {n} numbers, one score for each image"
    return (
        f"it must return a tensor of shape ({n},), one score for each image, made from the pixels by differentiable "
        "operations only: no detach(), no torch.no_grad(), no NumPy, no pictures of PIL; or train on its numbers with "
        "--reward_mode surrogate"
    )
