"""A user's own reward: `path/to/file.py:function`."""

import hashlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import torch

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.asking import asking, first_line
from diff_instruct.rewards.numbers import NoScores, pictures_of, scores_of, wanted
from diff_instruct.rewards.pixels import clamp


def load_function(spec):
    """The callable that `path/to/file.py:function` names.

    Raises:
        Mistake: if there is no such file or function, or the file cannot be imported.
    """
    path, _, name = spec.rpartition(":")
    # A name that no other module has, in sys.modules, where dataclasses and pickle look for a class's module.
    own = f"{Path(path).stem}_{hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=8).hexdigest()}"
    module_spec = importlib.util.spec_from_file_location(own, path)
    module = sys.modules[own] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # as of a script that parses the command line
        del sys.modules[own]
        raise Mistake(f"reward `{spec}`: {path} cannot be imported: {first_line(error)}") from error
    if not callable(vars(module).get(name)):
        raise Mistake(f"reward `{spec}`: {path} has no function `{name}`")
    return vars(module)[name]


def takes_pictures(function):
    """Whether a function's first parameter is said to be pictures of PIL, as `images: list[Image.Image]`."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):  # of what has no signature
        return False
    return first is not None and re.search(r"\bImage\b", str(first.annotation)) is not None


class FunctionReward(torch.nn.Module):
    """Calls a user's reward and checks what comes back: a score for each image, (B,).

    The function gets pixels (B, 3, H, W) in [0, 1] and a list of B prompts; or, if its first parameter is annotated
    with PIL's `Image`, a list of B pictures. Where it is trained on by its gradient it returns a tensor that has one;
    elsewhere a list or an array of numbers does as well.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec, self.function = spec, load_function(spec)
        self.takes_pictures = takes_pictures(self.function)

    def forward(self, pixels, prompts):
        """Scores (B,), in full precision, of pixels (B, 3, H, W) for B prompts.

        The function gets them in [0, 1]; pixels outside keep their gradient.

        Raises:
            NoScores: if the function fails; for an output that is no score for each image, or has no gradient where
                one is needed.
        """
        n, needs_gradient = len(pixels), torch.is_grad_enabled() and pixels.requires_grad
        inputs = pictures_of(pixels) if self.takes_pictures else clamp(pixels)
        with asking(f"reward `{self.spec}`", self.spec.rpartition(":")[0]):
            r = self.function(inputs, list(prompts))
        if needs_gradient and not isinstance(r, torch.Tensor):
            raise NoScores(f"reward `{self.spec}` returned {type(r).__name__}; {wanted(n, gradient=True)}")
        r = scores_of(r, n, self.spec, pixels.device)
        if needs_gradient and not r.requires_grad:
            raise NoScores(f"reward `{self.spec}` returned scores without gradient; {wanted(n, gradient=True)}")
        return r

    def check(self, device, trained):
        """Tries it on two random pictures; if it is trained on, with the gradient.

        Raises:
            Mistake: see `forward`; or if the scores do not depend on the pixels, or they or their gradient are not
                finite. (While training such a step is skipped: see NonFinite.)
        """
        pixels = torch.rand(2, 3, 224, 224, device=device, requires_grad=trained)
        with torch.set_grad_enabled(trained):
            r = self(pixels, ["a red apple", "a blue cat"])
        if not torch.isfinite(r).all():
            raise Mistake(
                f"reward `{self.spec}` returned NaN or infinity; it must return a tensor of shape (2,), and finite"
            )
        if trained:
            (gradient,) = torch.autograd.grad(r.sum(), pixels, allow_unused=True)
            if gradient is None:
                raise Mistake(f"reward `{self.spec}` returned scores that do not depend on the pixels")
            if not torch.isfinite(gradient).all():
                raise Mistake(f"reward `{self.spec}` has a gradient with NaN or infinity in it")
