"""The rewards that `--reward` knows by name: one entry each, which all who ask for a reward read. No networks here."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


POCKET = Path(__file__).resolve().parents[2] / "pocket"


@dataclass(frozen=True)
class Published:
    """What is known of a reward before it is loaded.

    Args:
        place: "module:class", which has `from_pretrained(path, cache_dir)`.
        named (`bool`): whether `from_pretrained` takes the reward's name first: several are of one class.
        folder: in `pocket/`, instead of the Hub.
        has_gradient: False for a measurement, which only judges.
        parameters, graph_bytes: of its networks; and what a graph holds for one picture in float32, as the memory
            plan's `Live` counts it on `benchmarks/reward_cost.py`'s networks. 0: not known, or next to nothing.
        tokens: of a prompt that it reads; None: all of them.
        unit: of its score, where it is published in others, too; each class says more.
    """

    place: str
    named: bool = False
    folder: str | None = None
    has_gradient: bool = True
    parameters: int = 0
    graph_bytes: int = 0
    tokens: int | None = None
    unit: str | None = None

    def load(self, name, path=None, cache_dir=None):
        """The reward, from a local copy or from where it is published."""
        module, cls = self.place.split(":")
        from_pretrained = getattr(import_module(module), cls).from_pretrained
        if self.folder is not None:
            path = path or POCKET / self.folder
        return from_pretrained(*[name] * self.named, path=path, cache_dir=cache_dir)


CATALOGUE = {
    "image_reward": Published(
        "diff_instruct.rewards.image_reward:ImageReward", parameters=446_206_689, graph_bytes=267_699_784, tokens=35
    ),
    "hpsv2": Published(
        "diff_instruct.rewards.hpsv2:HPSv2",
        named=True,
        parameters=986_109_441,
        graph_bytes=424_970_780,
        tokens=77,
        unit="100 · cosine",
    ),
    "hpsv2.1": Published(
        "diff_instruct.rewards.hpsv2:HPSv2",
        named=True,
        parameters=986_109_441,
        graph_bytes=424_970_780,
        tokens=77,
        unit="100 · cosine",
    ),
    "hpsv3": Published(
        "diff_instruct.rewards.hpsv3:HPSv3",
        parameters=7_748_610_610,
        graph_bytes=9_607_395_792,  # with 850 tokens, the picture's 256 among them
        unit="μ, without bounds",
    ),
    "pickscore": Published(
        "diff_instruct.rewards.pickscore:PickScore",
        parameters=986_109_441,
        graph_bytes=424_970_780,
        tokens=77,
        unit="exp(logit scale) · cosine, about 100 · cosine",
    ),
    "clip": Published(
        "diff_instruct.rewards.clip:ClipScore",
        parameters=427_616_513,
        graph_bytes=357_307_816,
        tokens=77,
        unit="100 · max(cosine, 0)",
    ),
    "aesthetic": Published(
        "diff_instruct.rewards.aesthetic:Aesthetic", parameters=304_894_178, graph_bytes=356_903_848, tokens=0
    ),
    "pocket": Published("diff_instruct.rewards.pocket:PocketReward", named=True, folder="scorer", tokens=24),
    "pocket_heldout": Published(
        "diff_instruct.rewards.pocket:PocketReward", named=True, folder="scorer_heldout", tokens=24
    ),
    "pocket_truth": Published(
        "diff_instruct.rewards.pocket_truth:PocketTruth", folder="scorer_heldout", has_gradient=False, tokens=24
    ),
}
