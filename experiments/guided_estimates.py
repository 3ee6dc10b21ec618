"""What the guided reference asks for at each noise level, on the pocket: `python experiments/guided_estimates.py`.

Algorithm 1 noises the generator's latents to x_t and moves them towards the reference's guided estimate of x0,
∅ + α_cfg (c − ∅). Here is that estimate for the committed generator and 64 held-out prompts, at nine noise levels and
α_cfg 1, 2 and 4.5: the deviation of its latents, which is 1 for those of real pictures, and what is true of it when it
is decoded. Writes `guided_estimates.md` (table) and `guided_estimates.jpg` (pictures) beside this file.
"""

from pathlib import Path

import torch
from pocket_judge import Judge
from tqdm.auto import tqdm

from diff_instruct.evaluation.pictures import image_grid
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.reference import encode_null
from diff_instruct.prompts.conditioning import Conditioning


FRACTIONS = (0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)  # of the schedule; 0 is no noise
SCALES = (1.0, 2.0, 4.5)
SHOWN = 3


def guided_estimates(judge, generator=0):
    """{(fraction, α_cfg): x̂0 (P, C, H, W)} of the generator's latents for the held-out prompts, noised."""
    pipe, rng = judge.before, torch.Generator().manual_seed(generator)
    encode = Conditioning(pipe.encode_prompt, "cpu")
    ref, c = Denoiser(pipe, getattr(judge.stock, judge.models.denoiser)), encode(judge.prompts)
    null = encode_null(judge.models.family, judge.stock, pipe, encode)
    null = {k: v.expand(len(judge.prompts), *v.shape[1:]) for k, v in null.items()}
    z, eps = (torch.randn(len(judge.prompts), *pipe.latent_shape(), generator=rng) for _ in range(2))
    x0, found = pipe.generate(pipe.denoiser, z, c), {}
    for fraction in tqdm(FRACTIONS, desc="noise levels"):
        t = torch.full((len(z),), round(fraction * pipe.schedule.steps))
        x_t = pipe.schedule.add_noise(x0, eps, t)
        for scale in SCALES:
            found[fraction, scale] = ref.guided(x_t, t, c, null, scale).guided
    return found


@torch.no_grad()
def main():
    out, judge = Path(__file__).with_suffix(""), Judge()
    found, rows = guided_estimates(judge), []
    truth, pipe = judge.heldout["pocket_truth"], judge.before
    for fraction in FRACTIONS:
        cells = []
        for scale in SCALES:
            x0 = found[fraction, scale]
            m = truth.measure(pipe.decode(x0).clamp(0, 1), judge.prompts)
            parts = " / ".join(f"{100 * m[k].nanmean():.0f}" for k in ("background", "colour", "noun"))
            cells += [f"{x0.std():.2f}", parts]
        rows.append(f"| {fraction:.2f} | " + " | ".join(cells) + " |")
    head = "| noise level | " + " | ".join(f"α_cfg {g:g}: deviation | true, %" for g in SCALES) + " |"
    text = "\n".join([head, "|---" * (1 + 2 * len(SCALES)) + "|", *rows])
    Path(f"{out}.md").write_text(text + "\n")
    print(text)
    columns = {f"{f:g}": torch.cat([found[f, g][:SHOWN] for g in SCALES]) for f in FRACTIONS}
    labels = [f"guidance {g:g}: {prompt}" for g in SCALES for prompt in judge.prompts[:SHOWN]]
    sheet = image_grid({f: pipe.decode(x0).clamp(0, 1) for f, x0 in columns.items()}, labels)
    sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3)).save(f"{out}.jpg", quality=85)


if __name__ == "__main__":
    main()
