"""The methods of the Diff-Instruct family, each as defaults for `--preset`; arguments that are given win over them.

A value without a comment defines the method. Where a paper's value is not known to us, the comment says so.
"""

PRESETS = {
    # Diff-Instruct, arXiv 2305.18455: the integral KL to the reference, without guidance or reward.
    "di": {"divergence": "ikl", "reward_scale": 0.0, "cfg_scale": 1.0},
    # Score Implicit Matching, arXiv 2410.16794: the score-based divergence, without reward.
    "sim": {"divergence": "score", "score_distance": "pseudo_huber", "reward_scale": 0.0},
    # Diff-Instruct++, arXiv 2410.18881.
    "di++": {
        "divergence": "ikl",
        "reward_mode": "clean",
        "reward_scale": 10.0,  # the strongest of the paper's five settings of (α_cfg, α_rew)
        "cfg_scale": 4.5,
    },
    # Diff-Instruct*, arXiv 2410.20898: guidance inside the distance, as the paper finds best.
    "di*": {
        "divergence": "score",
        "score_distance": "pseudo_huber",
        "score_guidance": "inside",
        "reward_mode": "clean",
    },
    # Diff-Instruct with Diffused Reward, arXiv 2605.24001.
    "didr": {"divergence": "ikl", "reward_mode": "diffused", "diffused_reward_steps": 1},
}
