"""The paper's five settings of guidance and reward on the pocket reference: `python experiments/five_settings.py`.

(α_cfg, α_rew) = (1, 0), (1, 1), (4.5, 0), (4.5, 1), (4.5, 10), from one pretrained generator, three seeds each; and
the reference in 1 and in 25 steps. Guidance acts at all noise levels, as in the paper. Writes `five_settings.md`
(tables), `five_settings.png` (curves) and `five_settings_grid.jpg` beside this file. Diff-Instruct++, arXiv
2410.18881, section 5.
"""

from pathlib import Path

import pocket_runs as runs
from pocket_tables import curves, tables

from diff_instruct.evaluation.pictures import image_grid


SETTINGS = {f"({cfg}, {rew})": runs.setting(cfg, rew) for cfg, rew in ((1, 0), (1, 1), (4.5, 0), (4.5, 1), (4.5, 10))}
# What each ingredient adds, all else equal.
PAIRS = [
    ("(4.5, 0)", "(1, 0)"), ("(4.5, 1)", "(1, 1)"),
    ("(1, 1)", "(1, 0)"), ("(4.5, 1)", "(4.5, 0)"), ("(4.5, 10)", "(4.5, 0)"),
]  # fmt: skip


def main():
    out = Path(__file__).with_suffix("")
    args = runs.parser(__doc__).parse_args()
    _, pictures, prompts = tables(SETTINGS, PAIRS, f"{out}.md", args)
    curves(SETTINGS, args, f"{out}.png")
    titles = [label.removeprefix("reference, ") for label in pictures]
    image_grid(dict(zip(titles, pictures.values())), prompts).save(f"{out}_grid.jpg", quality=85)


if __name__ == "__main__":
    main()
