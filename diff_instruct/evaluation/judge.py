"""Judging a generator on fixed prompt and seed pairs, with confidence intervals."""

from itertools import chain

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from diff_instruct.evaluation.noise import fixed_noise, further_noise
from diff_instruct.evaluation.pictures import draw
from diff_instruct.rewards.asking import ask, asking
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.numbers import NoScores


def pixel_features(pixels):
    """Unit vectors (B, D) of the pictures themselves, at 16×16 and without their mean: when no scorer has features."""
    small = F.interpolate(pixels, size=(16, 16), mode="area").flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=-1)


def first_features(scorers):
    """(name, features) of what diversity is measured with: a function from pixels (B, 3, H, W) to unit vectors.

    The first of the scorers (a `dict` by name) that has image features; users' functions have none, and if there is
    nothing else it is the pictures themselves.
    """
    for name, scorer in scorers.items():
        if isinstance(scorer, Scorer):
            return name, scorer.image_features
    return "pixels", pixel_features


def diversity_features(reward, heldout):
    """`first_features` of the held-out scorers, else of those that are trained on."""
    return first_features({**heldout, **dict(zip(reward.names, reward.rewards))})


def diversity(features):
    """Mean of 1 − cosine between the images of one prompt, from their unit vectors (n, D), n at least 2.

    As half the squared distance, which it is: so 0 for equal pictures, also for those without features (of one colour,
    whose vectors are 0).
    """
    return torch.pdist(features).square().mean() / 2


def judge_images(pixels, prompts, reward, heldout, batch_size=16):
    """Scores of n images (n, 3, H, W) in [0, 1] of one prompt, given n times: one row of `evaluate`'s.

    Raises:
        NoScores: whatever else a judge raises, see `asking`.
    """
    return ask_judges(pixels, prompts, reward, heldout, batch_size)()


def ask_judges(pixels, prompts, reward, heldout, batch_size=16):
    """The same without waiting for judges elsewhere: a function that waits, and gives the scores."""
    answers, starts = {}, range(0, len(pixels), batch_size)
    for name, scorer in {**dict(zip(reward.names, reward.rewards)), **heldout}.items():
        with asking(f"reward `{name}`"):
            answers[name] = [ask(scorer, pixels[i : i + batch_size], prompts[i : i + batch_size]) for i in starts]
    features, features_of = diversity_features(reward, heldout)
    with asking(f"what diversity is measured by, `{features}`,"):
        seen = diversity(torch.cat([features_of(pixels[i : i + batch_size]) for i in starts]))

    def row():
        scores = {}
        for name, waits in answers.items():
            with asking(f"reward `{name}`"):
                scores[name] = torch.cat([wait() for wait in waits])
        parts = {name: scores[name] for name in reward.names}
        found = {"reward": reward.combine(parts)} if parts else {}
        if not reward.is_plain:
            found |= {f"reward_{name}": r for name, r in parts.items()}
        found |= {f"heldout_{name}" if k else "heldout": scores[name] for k, name in enumerate(heldout)}
        return {**found, "diversity": seen}

    return row


@torch.no_grad()
def evaluate(accelerator, generator, encode, prompts, n_images, latent_shapes, reward, heldout, batch_size):
    """Scores of `n_images` images for each prompt, every process taking its share of the prompts.

    All draw for equally many, the last one again where there is none left: a sharded generator takes all processes. A
    judge elsewhere looks at a prompt's images while those of the next are drawn.

    Args:
        generator ([`Denoiser`]): with the weights that are to be judged.
        encode: prompts to conditioning.
        latent_shapes: (C, H, W) of each size; the prompts take them in turn.
        reward ([`Mix`]): what is trained on.
        heldout (`dict`): scorers by name, may be empty.
        batch_size: images that are decoded and scored at a time.

    Returns:
        `dict` of tensors: (P, n) for `reward`, if there is one, for its parts `reward_<name>` if it is more than one
        reward as it is, for the first held-out scorer `heldout` and for others `heldout_<name>`; (P,) for `diversity`:
        within a prompt, the mean of 1 − cosine between image features (see `diversity_features`).

    Raises:
        NoScores: on all processes, if a judge gives one of them none.
    """

    def drawn():
        for first in range(0, len(prompts), accelerator.num_processes):
            i = min(first + accelerator.process_index, len(prompts) - 1)
            shape = latent_shapes[i % len(latent_shapes)]
            z, c = fixed_noise(shape, i, n_images).to(accelerator.device), [prompts[i]] * n_images
            x0 = generator.generate(z, encode(c), further_noise(generator.pipe, z, i))
            yield i, c, torch.cat([generator.pipe.decode(part).clamp(0, 1) for part in x0.split(batch_size)])

    rows, why, asked = [], None, None
    for images in chain(drawn(), [None]):
        try:
            if asked is not None:
                i, answer = asked
                rows.append((i, {key: value.tolist() for key, value in answer().items()}))
            asked = None
            if images is not None and why is None:
                i, c, pixels = images
                asked = i, ask_judges(pixels, c, reward, heldout, batch_size)
        except NoScores as error:
            asked, why = None, str(error)
    reasons = [reason for reason in gather_object([why]) if reason]
    if reasons:
        raise NoScores(reasons[0])
    rows = [row for _, row in sorted(dict(gather_object(rows)).items())]
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


WHILE_TRAINING = 16  # prompts that validations judge; all of them are judged before and after


class Judge:
    """Scores and pictures of the generator on fixed prompts and seeds that are never trained on.

    Args:
        generator ([`Denoiser`]), trained ([`Trained`]): its average is judged, if it has one.
        encode: prompts to conditioning.
        prompts: to score; pictures: to draw, in the first size.
        n_images: for each of the prompts to score.
        batch_size: images decoded and scored at a time.
    """

    def __init__(
        self, accelerator, generator, trained, encode, prompts, pictures, latent_shapes, n_images, batch_size
    ):
        self.accelerator, self.generator, self.trained, self.encode = accelerator, generator, trained, encode
        self.prompts, self.pictures, self.latent_shapes = prompts, pictures, latent_shapes
        self.n_images, self.batch_size = n_images, batch_size
        self.noise = fixed_noise(latent_shapes[0], 0, len(pictures)).to(accelerator.device)

    def __call__(self, reward, heldout, n_prompts=None):
        """(scores as `evaluate` gives them, of the first `n_prompts` or all; pictures (B, 3, H, W) in [0, 1])."""
        prompts, shapes = self.prompts[:n_prompts], self.latent_shapes
        options = self.n_images, shapes, reward, heldout, self.batch_size
        with self.trained.averaged():
            scores = evaluate(self.accelerator, self.generator, self.encode, prompts, *options)
            return scores, draw(self.generator, self.encode, self.pictures, self.noise)
