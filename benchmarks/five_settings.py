"""The paper's five settings of guidance and reward on the pocket reference: `python benchmarks/five_settings.py`.

(α_cfg, α_rew) = (1, 0), (1, 1), (4.5, 0), (4.5, 1), (4.5, 10), from one pretrained generator, three seeds each; and
the reference in 1 and in 25 steps. Writes `five_settings.md` (tables), `five_settings.png` (curves) and
`five_settings_grid.png` beside this file. Diff-Instruct++, arXiv 2410.18881, section 5.
"""

import time
from pathlib import Path

import pocket_runs as runs


SETTINGS = {
    f"cfg{cfg}-rew{rew}": f"--cfg_scale {cfg} --reward_scale {rew}"
    for cfg, rew in ((1, 0), (1, 1), (4.5, 0), (4.5, 1), (4.5, 10))
}
LABELS = {name: f"({name[3:].replace('-rew', ', ')})" for name in SETTINGS}
# What each ingredient adds, all else equal, and the strongest setting against the start.
PAIRS = [
    ("cfg4.5-rew0", "cfg1-rew0"), ("cfg4.5-rew1", "cfg1-rew1"),
    ("cfg1-rew1", "cfg1-rew0"), ("cfg4.5-rew1", "cfg4.5-rew0"), ("cfg4.5-rew10", "cfg4.5-rew1"),
    *((name, "before") for name in SETTINGS),
]  # fmt: skip


def main():
    started, out = time.time(), Path(__file__).with_suffix("")
    args = runs.parser(__doc__).parse_args()
    runs.train(SETTINGS, args)
    scores, pictures, prompts = runs.judge_all(SETTINGS, args)
    tables = [runs.markdown(scores, LABELS), runs.paired(scores, PAIRS, LABELS), runs.provenance(args, started)]
    Path(f"{out}.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    runs.curves(SETTINGS, args, LABELS, f"{out}.png")
    titles = [LABELS.get(name, name) for name in pictures]
    runs.image_grid(list(pictures.values()), titles, prompts).save(f"{out}_grid.png")


if __name__ == "__main__":
    main()
