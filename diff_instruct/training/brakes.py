"""Brakes against reward hacking that act over time: a slow start and an early stop. (A third: caps, in mix.py.)"""


def warmed_up(reward_scale, step, warmup_steps):
    """α_rew at step 0, 1, ... of alignment: rises linearly and is `reward_scale` from step `warmup_steps` − 1 on.

    Before alignment, at negative steps, it is 0.
    """
    return reward_scale * min(1.0, (step + 1) / max(1, warmup_steps)) if step >= 0 else 0.0


def validations_since_best(scores):
    """How many of the last scores (a list, oldest first) are below the best before them."""
    best = max(scores)
    return len(scores) - 1 - max(i for i, score in enumerate(scores) if score == best)
