"""Several rewards as one: r(x, c) = Σ weight · min(r_i(x, c), cap_i), each r_i in its unit or standardised."""

import math
from functools import partial

import torch

from diff_instruct.rewards.asking import ask, asking


class Mix(torch.nn.Module):
    """A weighted sum of rewards, each in its published unit and, if it has a cap, no more than that.

    Above its cap a reward has no gradient (cap − relu(cap − r)): it stops being chased, which is a brake against
    reward hacking.

    Args:
        rewards (`dict`): a callable `(pixels, prompts) -> (B,)` for each name.
        weights (`dict`): a factor for each name.
        caps (`dict`, *optional*): an upper bound, in the reward's own unit, for some names.
        standardized: names of those that count as (min(r_i, cap_i) − mean) / spread, once `standards` has these two.
    """

    def __init__(self, rewards, weights, caps=None, standardized=()):
        super().__init__()
        self.names, self.rewards = list(rewards), torch.nn.ModuleList(rewards.values())
        self.weights, self.caps = weights, caps or {}
        self.standardized, self.standards = list(standardized), {}
        self.seen = {name: [] for name in self.names}
        self.unsound = {}

    @property
    def is_plain(self):
        """One reward as it is: there are no parts to tell from the whole."""
        return list(self.weights.values()) == [1.0] and not self.caps and not self.standardized

    def part(self, name):
        """The reward of this name."""
        return self.rewards[self.names.index(name)]

    def combine(self, scores):
        """The mix (B,) of the published score (B,) of each part."""
        return sum(self.weights[name] * self.counted(name, r) for name, r in scores.items())

    def counted(self, name, r):
        """What counts of a part's published score, without its weight."""
        r = r.clamp(max=self.caps.get(name, math.inf))
        if name not in self.standards:
            return r
        return (r - self.standards[name]["mean"]) / self.standards[name]["spread"]

    def forward(self, pixels, prompts):
        """r(x, c), (B,), of pixels (B, 3, H, W) in [0, 1] for B prompts; remembers its parts for `take_parts`, and
        for `take_unsound` which of them, or of their gradients, are not finite. Raises NoScores, see `asking`."""
        return self.ask(pixels, prompts)()

    def ask(self, pixels, prompts):
        """The same without waiting for judges elsewhere: a function that waits, and gives r(x, c)."""
        answers = {}
        for name, reward in zip(self.names, self.rewards):
            own = pixels.view_as(pixels)  # so that its gradient can be told from the others'
            if own.requires_grad:
                own.register_hook(partial(self.look, name))
            with asking(f"reward `{name}`"):
                answers[name] = ask(reward, own, prompts)

        def answer():
            scores = {}
            for name, wait in answers.items():
                with asking(f"reward `{name}`"):
                    scores[name] = wait()
                self.look(name, scores[name])
                self.seen[name].append(scores[name].detach())
            return self.combine(scores)

        return answer

    def look(self, name, values):
        """Remember whether a part's scores or gradient are finite; nothing is waited for. None: no gradient came."""
        if values is None:
            return
        unsound = ~values.detach().isfinite().all()
        self.unsound[name] = unsound | self.unsound[name] if name in self.unsound else unsound

    def take_unsound(self):
        """Names of the parts whose scores or gradients were not finite since the last call."""
        names, self.unsound = [name for name, unsound in self.unsound.items() if unsound], {}
        return names

    def take_parts(self, n):
        """For the log: `reward_<name>`, the mean published score of each part over the last n images; empty if there
        is but one reward as it is. What was remembered is forgotten."""
        means = {f"reward_{name}": torch.cat(seen)[-n:].mean() for name, seen in self.seen.items() if seen}
        self.seen = {name: [] for name in self.names}
        return {} if self.is_plain else means
