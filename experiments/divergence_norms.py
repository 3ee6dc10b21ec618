"""How hard each divergence pulls at each noise level of the pocket reference.

`python experiments/divergence_norms.py`: the committed generator draws 16 training prompts, a teaching assistant has
warmed up for 30 steps, and the norms of the divergence's gradient at x0, a mean per sample, are printed for t = 100 to
980 and guidance of 4.5 at all levels.
"""

from contextlib import nullcontext
from pathlib import Path

import torch

from diff_instruct.models.actors import load_actors
from diff_instruct.models.reference import encode_null
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.prompts.encoding import make_conditioning
from diff_instruct.terms import IKL, Alpha, Batch, ScoreDistance
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.steps import GeneratorStep, ta_loss


TIMESTEPS = (100, 200, 400, 600, 800, 900, 980)
DIVERGENCES = {
    "integral KL, `dmd`": (IKL(), "dmd"),
    "pseudo-Huber, `x0`": (ScoreDistance("pseudo_huber"), "x0"),
    "`l2`, `dmd`": (ScoreDistance("l2"), "dmd"),
}
BATCH, WARM_UP = 16, 30


def main():
    args, device = parse_args(["--output_dir", "not-made"]), torch.device("cpu")
    models = models_of(args)
    actors = load_actors(models, roles_of(args, models), device, torch.float32, nullcontext, args)
    encode, prompts = make_conditioning(args, actors.pipe, device), Path(args.train_prompts).read_text().splitlines()
    null = encode_null(models.family, actors.stock, actors.pipe, encode)
    null = {k: v.expand(BATCH, *v.shape[1:]) for k, v in null.items()}
    optimizer, rng = torch.optim.AdamW(actors.ta.network.parameters(), args.learning_rate), torch.Generator()
    rng.manual_seed(0)

    def batch(t):
        texts = [prompts[i] for i in torch.randint(len(prompts), (BATCH,), generator=rng)]
        z, eps = torch.randn(2, BATCH, *actors.pipe.latent_shape(), generator=rng)
        return Batch(texts, encode(texts), z, z[:0], torch.zeros(BATCH, dtype=torch.int64), t, eps)

    for _ in range(WARM_UP):
        t = actors.pipe.schedule.timesteps(torch.rand(BATCH, generator=rng), 0.02, 0.98)
        ta_loss(batch(t), actors.generator, actors.ta).backward()
        optimizer.step()
        optimizer.zero_grad()
    actors.ta.network.requires_grad_(False)
    drawn = batch(torch.zeros(BATCH, dtype=torch.int64))
    with torch.no_grad():
        x0 = actors.generator.generate(drawn.z, drawn.c)
    print("| t | " + " | ".join(map(str, TIMESTEPS)) + " |\n" + "|---" * (len(TIMESTEPS) + 1) + "|")
    for name, (divergence, weighting) in DIVERGENCES.items():
        step, cells = GeneratorStep(actors.ta, actors.ref, null, (divergence,), weighting), []
        for t in TIMESTEPS:
            gradient, _ = step(x0, drawn._replace(t=torch.full((BATCH,), t)), Alpha(4.5))
            cells.append(f"{gradient.flatten(1).norm(dim=1).mean():.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
