"""The methods of the Diff-Instruct family, each as defaults for `--preset`; arguments that are given win over them.

A preset sets what makes the method: divergence, where the reward acts, what is switched off. These follow the papers'
formulas. Of the numbers, only α_cfg and α_rew of `di++` are a paper's, and the ones that `di` and `sim` switch off.
SIM's, DI*'s and DIDR's own α_rew, α_cfg, c, k and w(t) are not known to us: there a number is the script's default
(α_cfg 4.5, `--huber_c` 0.01, `--weighting dmd`) or our choice by the norms of the terms, and is to be tuned.
"""

PRESETS = {
    # Diff-Instruct, arXiv 2305.18455: the integral KL to the reference, without guidance or reward.
    "di": {"divergence": "ikl", "reward_scale": 0.0, "cfg_scale": 1.0},
    # Score Implicit Matching, arXiv 2410.16794: the score-based divergence, without reward.
    "sim": {"divergence": "score", "score_distance": "pseudo_huber", "reward_scale": 0.0},  # α_cfg: default
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
        "reward_scale": 200.0,  # ours: on the pocket reference the reward then pulls as the divergence does (README)
    },
    # Diff-Instruct with Diffused Reward, arXiv 2605.24001.
    "didr": {
        "divergence": "ikl",
        "reward_mode": "diffused",
        "diffused_reward_steps": 1,  # ours: the least; the paper's is not known to us
        "reward_scale": 3.0,  # ours: on the pocket reference the reward then pulls as the divergence does (README)
    },
}
