"""α_rew over the steps of alignment, and an early stop: what acts over time on the reward. (Caps are in mix.py.)"""

from math import inf, isfinite, isnan

from diff_instruct.mistake import Mistake


class RewardDial:
    """α_rew, which dL/dx0 = −α_rew ∇r + (the divergence's gradient) takes in each step: given, or measured.

    Given, it is `reward_scale`. With a `ratio` it is measured: over the first `ratio_steps` steps of alignment whose
    norms are finite α_rew is 0, so that the generator moves by the divergence alone and what is measured does not
    depend on α_rew; then it is fixed for the rest of the run so that the reward pulls `ratio` times as hard,
    α_rew = ratio · mean ‖divergence's gradient‖ / mean ‖∇r‖. Either way it rises linearly over the first
    `warmup_steps` steps of alignment, and before them, while pretraining, it is 0.

    Args:
        reward_scale (`float`, *optional*): α_rew ≥ 0; None with a `ratio`.
        warmup_steps (`int`): α_rew is whole from step `warmup_steps` − 1 on; 0: at once.
        ratio (`float`, *optional*): how many times as hard as the divergence the reward is to pull, > 0.
        ratio_steps (`int`): how many steps are measured, ≥ 1.

    `dial.reward_scale` is α_rew as given or measured, without the warm-up, and None while it is being measured.
    """

    def __init__(self, reward_scale=None, warmup_steps=0, ratio=None, ratio_steps=10):
        self.reward_scale, self.warmup_steps = reward_scale, warmup_steps
        self.ratio, self.ratio_steps = ratio, ratio_steps
        self.measured, self.sum_reward, self.sum_divergence = 0, 0.0, 0.0

    def measuring(self, step):
        """Whether step 0, 1, ... of alignment is to be observed, and so needs ∇r although α_rew is 0."""
        return step >= 0 and self.reward_scale is None

    def scale(self, step):
        """α_rew for step 0, 1, ... of alignment; 0 at negative steps and while it is being measured."""
        if step < 0 or self.reward_scale is None:
            return 0.0
        return self.reward_scale * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def observe(self, norm_reward, norm_divergence):
        """The norms of one step that `measuring` asked for; the one after which α_rew is known fixes it.

        Args:
            norm_reward (`float`): ‖∇r‖ at x0 per image, without α_rew, averaged over the batch.
            norm_divergence (`float`): the same of the divergence's gradient. On several processes both must be
                averages over all of them, so that all fix the same α_rew.

        Raises:
            Mistake: if no step had a gradient of the reward: there is nothing to scale.
        """
        if not (isfinite(norm_reward) and isfinite(norm_divergence)):
            return
        self.measured += 1
        self.sum_reward += norm_reward
        self.sum_divergence += norm_divergence
        if self.measured < self.ratio_steps:
            return
        if self.sum_reward == 0:
            raise Mistake(
                f"--reward_ratio: the reward had no gradient in {self.measured} steps: give --reward_scale, or lift "
                "its --reward_cap"
            )
        self.reward_scale = self.ratio * self.sum_divergence / self.sum_reward

    def state_dict(self):
        """Plain numbers, for the checkpoint: a resumed run goes on measuring, or keeps what was measured. Of an α_rew
        that was given there is nothing to keep."""
        names = ("reward_scale", "measured", "sum_reward", "sum_divergence") if self.ratio is not None else ()
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        """What `state_dict` returned."""
        vars(self).update(state)


def validations_since_best(scores):
    """How many of the last scores (a list, oldest first) are below the best before them; NaN is below all others."""
    scores = [-inf if isnan(score) else score for score in scores]
    best = max(scores)
    return len(scores) - 1 - max(i for i, score in enumerate(scores) if score == best)
