"""α_rew over the steps of alignment, and an early stop: what acts over time on the reward. (Caps are in mix.py.)"""

from math import inf, isfinite, isnan
from statistics import fmean

from diff_instruct.mistake import Mistake


class RewardDial:
    """α_rew, which dL/dx0 = −α_rew ∇r + (the divergence's gradient) takes in each step: given, or measured.

    Given, it is `reward_scale`. With a `ratio` it is measured. Meanwhile it is 0, so that the generator moves by the
    divergence alone and what is measured does not depend on α_rew; then it is fixed for the rest of the run so that
    the reward pulls `ratio` times as hard, α_rew = ratio · mean ‖divergence's gradient‖ / mean ‖∇r‖.

    The divergence's gradient is s_ψ − s_ref, which is 0 where the teaching assistant begins, as the reference, and
    grows until it knows the generator. So what counts are the later half of the n steps with finite norms so far, and
    they count when the divergence pulls there no more than a tenth harder than in the quarter before: looked at n =
    `ratio_steps`, and whenever n has doubled since; at n = `most_steps` they count in any case.

    Either way α_rew rises linearly over the first `warmup_steps` steps of alignment with one, and before, while
    pretraining, it is 0.

    Args:
        reward_scale (`float`, *optional*): α_rew ≥ 0; None with a `ratio`.
        warmup_steps (`int`): α_rew is whole from step `warmup_steps` − 1 on; 0: at once.
        ratio (`float`, *optional*): how many times as hard as the divergence the reward is to pull, > 0.
        ratio_steps (`int`): how many steps are measured at least, ≥ 1.
        most_steps (`int`, *optional*): and at most; by default there is no end.

    `dial.reward_scale` is α_rew as given or measured, without the warm-up, and None while it is being measured.
    """

    def __init__(self, reward_scale=None, warmup_steps=0, ratio=None, ratio_steps=10, most_steps=None):
        self.reward_scale, self.warmup_steps = reward_scale, warmup_steps
        self.ratio, self.ratio_steps, self.most_steps = ratio, ratio_steps, most_steps or inf
        self.norms = []  # of the reward and of the divergence, of each step that was measured

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
        self.norms.append((norm_reward, norm_divergence))
        n = len(self.norms)
        doublings, rest = divmod(n, self.ratio_steps)
        due = rest == 0 and doublings & (doublings - 1) == 0
        if n < self.most_steps and not due:
            return
        if not any(reward for reward, _ in self.norms):
            raise Mistake(
                f"--reward_ratio: the reward had no gradient in {n} steps: give --reward_scale, or lift its "
                "--reward_cap"
            )
        reward, late = (fmean(norms) for norms in zip(*self.norms[n // 2 :]))
        early = fmean(divergence for _, divergence in self.norms[n // 4 : n // 2] or self.norms)
        if reward and (late <= 1.1 * early or n >= self.most_steps):
            self.reward_scale = self.ratio * late / reward

    def state_dict(self):
        """Plain numbers, for the checkpoint: a resumed run goes on measuring, or keeps what was measured. Of an α_rew
        that was given there is nothing to keep."""
        names = ("reward_scale", "norms") if self.ratio is not None else ()
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        """What `state_dict` returned."""
        vars(self).update(state)


def validations_since_best(scores):
    """How many of the last scores (a list, oldest first) are below the best before them; NaN is below all others."""
    scores = [-inf if isnan(score) else score for score in scores]
    best = max(scores)
    return len(scores) - 1 - max(i for i, score in enumerate(scores) if score == best)
