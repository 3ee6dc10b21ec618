"""The bare command with one thing changed at a time, on the pocket reference: `python experiments/one_change.py`.

What does guidance of 4.5 do to this reference, and what helps against it? Which `--weighting` is best? Every run
starts from the committed one-step generator with (α_cfg, α_rew) = (4.5, 10), guided at the lower half of the noise
levels. Writes `one_change.md` and
`one_change.png` beside this file.
"""

from pathlib import Path

import pocket_runs as runs


BARE = "--cfg_scale 4.5 --reward_scale 10 --cfg_interval 0 0.5"
CHANGES = {  # what is changed: arguments
    "nothing": "",
    "α_cfg 1": "--cfg_scale 1",
    "α_cfg 2": "--cfg_scale 2",
    "α_cfg 3": "--cfg_scale 3",
    "w(t) `eps`": "--weighting eps",
    "w(t) `x0`": "--weighting x0",
    "w(t) `score`": "--weighting score",
    "low noise alone": "--max_timestep 0.6",
    "high noise alone": "--min_timestep 0.4",
    "K_TA 3": "--ta_steps 3",
    "TA's rate × 3": "--ta_learning_rate 3e-4",
    "both rates ÷ 3": "--learning_rate 3e-5 --ta_learning_rate 3e-5",
    "guidance at all noise levels": "--cfg_interval 0 1",
    "guidance at high noise alone": "--cfg_interval 0.5 1",
    "guidance at low noise alone": "--cfg_interval 0 0.25",
}


def main():
    out = Path(__file__).with_suffix("")
    args = runs.parser(__doc__).parse_args()
    names = {f"change{k}": change for k, change in enumerate(CHANGES)}
    settings = {name: f"{BARE} {CHANGES[change]}" for name, change in names.items()}
    pairs = [(name, "change0") for name in settings if name != "change0"]
    runs.tables(settings, pairs, names, f"{out}.md", args)
    runs.curves(settings, args, names, f"{out}.png")


if __name__ == "__main__":
    main()
