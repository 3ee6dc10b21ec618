"""The first command with one thing changed at a time, on the pocket reference: `python experiments/one_change.py`.

What does guidance of 4.5 do to this reference, and what helps against it? Which `--weighting` is best? What does the
reward do where nothing holds it? Every run starts from the committed one-step generator with (α_cfg, α_rew) =
(4.5, 10), guided at the lower half of the noise levels. `--only` names the questions asked. Writes
`one_change_<question>.md` and `.png` beside this file.
"""

from functools import partial
from pathlib import Path

import pocket_runs as runs


changed = partial(runs.setting, 4.5, 10, "0 0.5")
NOTHING = {"nothing": changed()}
QUESTIONS = {
    "guidance": {
        "α_cfg 1": runs.setting(1, 10),
        "α_cfg 2": runs.setting(2, 10, "0 0.5"),
        "4.5 at all noise levels": runs.setting(4.5, 10),
        "4.5 at high noise alone": runs.setting(4.5, 10, "0.5 1"),
        "4.5 at the lowest quarter": runs.setting(4.5, 10, "0 0.25"),
    },
    "weighting": {f"w(t) `{name}`": changed(f"--weighting {name}") for name in ("eps", "x0", "score")},
    "reward": {
        "α_rew 0": runs.setting(4.5, 0, "0 0.5"),
        "α_rew 1": runs.setting(4.5, 1, "0 0.5"),
        "α_rew 100": runs.setting(4.5, 100, "0 0.5"),
        "α_rew 10,000": runs.setting(4.5, 10_000, "0 0.5"),
    },
    "training": {
        "K_TA 3": changed("--ta_steps 3"),
        "TA's rate × 3": changed("--ta_learning_rate 3e-4"),
        "both rates ÷ 3": changed("--learning_rate 3e-5 --ta_learning_rate 3e-5"),
    },
}


def main():
    out = Path(__file__).with_suffix("")
    parser = runs.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions asked")
    args = parser.parse_args()
    for question in args.only:
        settings = {**NOTHING, **QUESTIONS[question]}
        pairs = [(label, "nothing") for label in QUESTIONS[question]]
        runs.tables(settings, pairs, f"{out}_{question}.md", args)
        runs.curves(settings, args, f"{out}_{question}.png")


if __name__ == "__main__":
    main()
