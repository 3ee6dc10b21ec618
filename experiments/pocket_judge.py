"""Scores and truth of the runs of `pocket_runs`, on the pocket's 64 held-out prompts.

They are pairs of noun and colour or background that neither reference nor generator nor reward has seen, judged by the
trained reward, by a scorer that nothing is trained on, and by the truth (`pocket.truth`).
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from pocket_runs import finished
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diff_instruct.evaluation.judge import judge_images
from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.pictures import real_pictures
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.reference import sample
from diff_instruct.models.sources import models_of
from diff_instruct.rewards.loading import load_mix, load_scorers
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.training.arguments import parse_args
from pocket.build import BEST_GUIDANCE


N_IMAGES = 4
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}
METRICS = {
    "reward": "`pocket` (trained)",
    "heldout": "`pocket_heldout` (not trained)",
    "background": "background",
    "colour": "colour",
    "noun": "noun",
    "truth": "truth, the mean of the three",
    "diversity": "diversity",
}


class Judge:
    """Scores and truth of images of the pocket's held-out prompts."""

    def __init__(self, work_dir="not-made"):
        args = parse_args(["--output_dir", work_dir])
        self.models = models_of(args)
        self.stock = load_reference(self.models, torch.float32)
        self.before = load_generator(self.models, self.stock)
        trained, reported = read_rewards(args)
        self.reward, self.heldout = load_mix(trained, "cpu"), load_scorers(reported, "cpu")
        self.prompts = Path(args.eval_prompts).read_text().splitlines()
        self.shown = self.prompts[:8]
        self.real = dict(zip(self.prompts, real_pictures(args.validation_images, self.prompts)))

    @torch.no_grad()
    def __call__(self, file, draw):
        """Scores as in `evaluate` and the pictures shown, of `draw(prompts, z)`, which returns pixels in [0, 1]."""
        if not file.exists():
            shape, rows = self.before.latent_shape(), []
            for i, prompt in enumerate(tqdm(self.prompts, desc=file.parent.name, leave=False)):
                c = [prompt] * N_IMAGES
                pixels = draw(c, fixed_noise(shape, i, N_IMAGES))
                row = judge_images(pixels, c, self.reward, self.heldout)
                told = self.heldout["pocket_truth"].measure(pixels, c)
                rows.append({**row, **told, "truth": torch.stack(list(told.values())).nanmean(dim=0)})
            scores = {k: torch.stack([row[k] for row in rows]) for k in METRICS}
            pictures = torch.cat([draw([p], fixed_noise(shape, 1000 + i, 1)) for i, p in enumerate(self.shown)])
            save_file({k: v.contiguous() for k, v in {**scores, "pictures": pictures}.items()}, file)
        return load_file(file)

    def runs(self, folders):
        """Scores and pictures of each run, kept beside it."""
        return [self(f / "scores.safetensors", one_step(pipe)) for f, pipe in zip(folders, pipelines(folders))]

    def draw_real(self, prompts, z):
        """The real picture of each prompt, whatever the noise."""
        return torch.stack([self.real[prompt] for prompt in prompts])

    @torch.no_grad()
    def distance(self, pipe):
        """Root mean squared difference of a one-step pipeline's pixels in [0, 1] from the real picture's, (P,): no
        network's opinion. The other icon set's picture counts as different, too, so the level says little."""
        shape, draw, distances = pipe.latent_shape(), one_step(pipe), []
        for i, prompt in enumerate(self.prompts):
            difference = draw([prompt] * N_IMAGES, fixed_noise(shape, i, N_IMAGES)) - self.real[prompt]
            distances.append(difference.square().flatten(1).mean(dim=1).sqrt().mean())
        return torch.stack(distances)

    def reference(self, steps, guidance):
        """How the reference draws: by its own sampler, or x̂0 at the last timestep if it is one step."""
        stock, side = self.stock, self.models.grid.side
        if steps == 1:  # PixArt-α's own sampler has no single step
            stock = type(stock).from_pipe(
                stock, scheduler=DDIMScheduler.from_config(stock.scheduler.config, **TRAILING)
            )
        return lambda prompts, z: sample(self.models, stock, prompts, z, steps, guidance, (side, side))


def pipelines(folders):
    """The exported pipelines of these runs, one after the other."""
    return (DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True) for folder in folders)


def one_step(pipe):
    """How a one-step pipeline draws: pixels (B, 3, H, W) in [0, 1] of B prompts from noise z."""
    return lambda prompts, z: pipe(prompts, latents=z, output_type="pt").images


def judge_all(settings, args):
    """Scores by label, each stacked over seeds: (S, P, n), (S, P) for diversity; and pictures of seed 0."""
    judge, work_dir = Judge(args.work_dir), Path(args.work_dir)
    scores = {
        "real pictures": [judge(work_dir / "real.safetensors", judge.draw_real)],
        "reference, 1 step": [judge(work_dir / "reference-1.safetensors", judge.reference(1, 4.5))],
        **{
            f"reference, 25 steps, guidance {g}": [
                judge(work_dir / f"reference-25-{g}.safetensors", judge.reference(25, g))
            ]
            for g in (1.0, BEST_GUIDANCE, 4.5)
        },
        "before": [judge(work_dir / "before.safetensors", one_step(judge.before))],
    }
    for label, arguments in settings.items():
        scores[label] = judge.runs(finished(arguments, args))
    pictures = {label: rows[0]["pictures"] for label, rows in scores.items()}
    return {label: stacked(rows) for label, rows in scores.items()}, pictures, judge.shown


def stacked(rows):
    """{metric: (S, P, n)}, (S, P) for diversity, of the scores of S runs."""
    return {k: torch.stack([row[k] for row in rows]) for k in METRICS}
