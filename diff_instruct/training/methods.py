"""The methods of the Diff-Instruct family: what makes each, its paper, and which of them a run's arguments are."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A method and its paper.

    Args:
        name: as tables and model cards write it.
        arxiv: number of the paper.
        key, title, authors: of its BibTeX entry.
        defaults: what `--preset` sets; arguments that are given win over them.
    """

    name: str
    arxiv: str
    key: str
    title: str
    authors: str
    defaults: dict = field(hash=False)

    @property
    def bibtex(self):
        """The BibTeX entry of the paper."""
        return f"""\
@article{{{self.key},
  title   = "{{{self.title}}}",
  author  = {{{self.authors}}},
  journal = {{arXiv preprint arXiv:{self.arxiv}}},
  year    = {{20{self.arxiv[:2]}}}
}}"""


# By the name that `--preset` takes. α_rew and α_cfg of `sim` and `di*` are those that DI*'s authors published for SDXL
# at 1024 pixels (github.com/pkulwj1994/diff_instruct_star, Table 2); what they do to another model, or to a reward in
# another unit, is to be tried: see `--reward_ratio`. Not public are c, w(t), π(t) of SIM, DI* and DIDR, and DIDR's
# α_rew and k: there the script's defaults stand in (`--huber_c`, `--weighting`), or a number of ours, marked as such.
METHODS = {
    "di": Method(
        name="Diff-Instruct",
        arxiv="2305.18455",
        key="luo2023diffinstruct",
        title="Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        authors="Luo, Weijian and Hu, Tianyang and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and Zhang, Zhihua",
        defaults={"divergence": "ikl", "reward_scale": 0.0, "cfg_scale": 1.0},
    ),
    "sim": Method(
        name="Score Implicit Matching",
        arxiv="2410.16794",
        key="luo2024sim",
        title="One-Step Diffusion Distillation through Score Implicit Matching",
        authors="Luo, Weijian and Huang, Zemin and Geng, Zhengyang and Kolter, J. Zico and Qi, Guo-jun",
        defaults={
            "divergence": "score",
            "score_distance": "pseudo_huber",
            "score_guidance": "inside",
            "reward_scale": 0.0,
            "cfg_scale": 7.5,
        },
    ),
    "di++": Method(
        name="Diff-Instruct++",
        arxiv="2410.18881",
        key="luo2024diffinstructpp",
        title="Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences",
        authors="Luo, Weijian",
        defaults={
            "divergence": "ikl",
            "reward_mode": "clean",
            "reward_scale": 10.0,  # the strongest of the paper's five settings of (α_cfg, α_rew)
            "cfg_scale": 4.5,
        },
    ),
    "di*": Method(
        name="Diff-Instruct*",
        arxiv="2410.20898",
        key="luo2024diffinstructstar",
        title="Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models",
        authors="Luo, Weijian and Zhang, Colin and Zhang, Debing and Geng, Zhengyang",
        defaults={
            "divergence": "score",
            "score_distance": "pseudo_huber",
            "score_guidance": "inside",
            "reward_mode": "clean",
            "reward_scale": 100.0,
            "cfg_scale": 7.5,
        },
    ),
    "didr": Method(
        name="Diff-Instruct with Diffused Reward",
        arxiv="2605.24001",
        key="lin2026didr",
        title="Diff-Instruct with Diffused Reward: Towards Principled One-step Generator RL",
        authors="Lin, Guang and Zheng, Haoyang and Wu, Junyi and Zhang, Runzhe and Luo, Weijian",
        defaults={
            "divergence": "ikl",
            "reward_mode": "diffused",
            "diffused_reward_steps": 1,  # ours: the least
            "reward_scale": 3.0,  # ours: on the pocket reference the reward then pulls about as the divergence does
        },
    ),
}


SURROGATE = Method(  # no preset: no numbers are known to suit
    name="Diff-Instruct++ with a surrogate of the reward, as in TDM-R1",
    arxiv="2603.07700",
    key="luo2026tdmr1",
    title="TDM-R1: Reinforcing Few-Step Diffusion Models with Non-Differentiable Reward",
    authors="Luo, Yihong and Hu, Tianyang and Luo, Weijian and Tang, Jing",
    defaults={"divergence": "ikl", "reward_mode": "surrogate"},
)


def method_of(args):
    """The [`Method`] that the arguments are, whatever `--preset` says."""
    rewarded = args.reward_scale or args.reward_ratio
    if args.divergence == "score":
        return METHODS["di*" if rewarded else "sim"]
    if args.reward_mode == "diffused" and rewarded:
        return METHODS["didr"]
    if args.reward_mode == "surrogate" and rewarded:
        return SURROGATE
    return METHODS["di++" if rewarded or args.cfg_scale != 1 else "di"]
