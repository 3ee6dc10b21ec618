"""Where Algorithm 1 stands: what a checkpoint holds, and a resumed run goes on with."""

import time
from dataclasses import dataclass, field

from diff_instruct.prompts.stream import Sampler
from diff_instruct.training.optimizer import Trained
from diff_instruct.training.reward_scale import RewardDial


@dataclass
class LoopState:
    """The state of the loop.

    Args:
        theta, psi ([`Trained`]): what is trained of generator and TA, with its optimizers and average; in files of
            their own.
        sampler ([`Sampler`]): how far prompts and random numbers are drawn.
        dial ([`RewardDial`]): α_rew, given or measured so far.
        step (`int`): iterations that are done, so the next one's number; negative while the TA warms up.
        heldout_scores (`list`): of the first held-out reward, one for each validation of this stage.
        started (`float`): when the run would have begun, had it never been stopped.
        phi ([`Trained`], *optional*): what is trained of the surrogate.
        unjudged (`bool`): whether a validation is due after `step`, which had no scores.
        standards (`dict`): of rewards that are standardised, see `standards_of`.
        begun (`dict`, *optional*): in the middle of an iteration, the state of `sampler` where it began.
        taught (`dict`, *optional*): in the middle of one whose steps of ψ are taken: the state of `sampler` and the
            figures after them, and the norm of ψ's gradient. A run that goes on there takes the rest alone.
    """

    theta: Trained
    psi: Trained
    sampler: Sampler
    dial: RewardDial
    step: int
    heldout_scores: list = field(default_factory=list)
    started: float = field(default_factory=time.time)
    phi: Trained | None = None
    unjudged: bool = False
    standards: dict = field(default_factory=dict)
    begun: dict | None = None
    taught: dict | None = None

    @property
    def networks(self):
        """What has files of its own, in their order."""
        return [self.theta, self.psi, *([] if self.phi is None else [self.phi])]

    @property
    def seconds(self):
        """Of the run so far, those before it was stopped included."""
        return time.time() - self.started

    @property
    def skipped_steps(self):
        """Steps of any network that were not taken."""
        return sum(trained.skipped for trained in self.networks)

    def state_dict(self):
        """Plain numbers of this process; tensors are the networks'."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "sampler": self.begun or self.sampler.state_dict(),
            "heldout_scores": self.heldout_scores,
            "dial": self.dial.state_dict(),
            "standards": self.standards,
            "networks": [trained.counters() for trained in self.networks],
            **({"unjudged": True} if self.unjudged else {}),
            **({"taught": plain(self.taught)} if self.taught else {}),
        }

    def load_state_dict(self, state):
        """Continue from what `state_dict` returned."""
        self.step, self.heldout_scores = state["step"], state["heldout_scores"]
        self.standards = state["standards"]
        self.started -= state["seconds"]
        self.unjudged, self.taught = state.get("unjudged", False), state.get("taught")
        self.sampler.load_state_dict(state["sampler"])
        self.dial.load_state_dict(state["dial"])
        for trained, counters in zip(self.networks, state["networks"]):
            trained.load_counters(counters)


def plain(taught):
    """`taught` with its figures as numbers, which they are already where a run has gone on with them."""
    return taught | {"figures": {key: [float(v) for v in values] for key, values in taught["figures"].items()}}
