"""The papers of the methods, as model cards name and cite them."""

LUO = "Luo, Weijian and "
# method: (key, arXiv id, title, authors)
PAPERS = {
    "Diff-Instruct": (
        "luo2023diffinstruct",
        "2305.18455",
        "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        LUO + "Hu, Tianyang and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and Zhang, Zhihua",
    ),
    "Score Implicit Matching": (
        "luo2024sim",
        "2410.16794",
        "One-Step Diffusion Distillation through Score Implicit Matching",
        LUO + "Huang, Zemin and Geng, Zhengyang and Kolter, J. Zico and Qi, Guo-jun",
    ),
    "Diff-Instruct++": (
        "luo2024diffinstructpp",
        "2410.18881",
        "Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences",
        "Luo, Weijian",
    ),
    "Diff-Instruct*": (
        "luo2024diffinstructstar",
        "2410.20898",
        "Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models",
        LUO + "Zhang, Colin and Zhang, Debing and Geng, Zhengyang",
    ),
    "Diff-Instruct with Diffused Reward": (
        "lin2026didr",
        "2605.24001",
        "Diff-Instruct with Diffused Reward: Towards Principled One-step Generator RL",
        "Lin, Guang and Zheng, Haoyang and Wu, Junyi and Zhang, Runzhe and Luo, Weijian",
    ),
}


def method(args):
    """The name, a key of `PAPERS`, of what the arguments do."""
    if args.divergence == "score":
        return "Diff-Instruct*" if args.reward_scale else "Score Implicit Matching"
    if args.reward_mode == "diffused" and args.reward_scale:
        return "Diff-Instruct with Diffused Reward"
    guided = args.reward_scale or args.cfg_scale != 1
    return "Diff-Instruct++" if guided else "Diff-Instruct"


def bibtex(name):
    """The entry of one paper."""
    key, arxiv, title, authors = PAPERS[name]
    return f"""\
@article{{{key},
  title   = "{{{title}}}",
  author  = {{{authors}}},
  journal = {{arXiv preprint arXiv:{arxiv}}},
  year    = {{20{arxiv[:2]}}}
}}"""
