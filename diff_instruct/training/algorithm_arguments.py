"""The arguments that say what Algorithm 1 does and which reward it follows, each with its range.

The defaults are those for real models (the paper's, where it gives them).
"""

from argparse import BooleanOptionalAction

from diff_instruct.command_line import (
    fraction,
    natural,
    non_negative,
    positive,
    positive_int,
    text,
    whole,
)
from diff_instruct.objectives import DISTANCES, WEIGHTINGS
from diff_instruct.rewards.catalogue import CATALOGUE
from diff_instruct.training.methods import METHODS


MAX_STEPS = 8  # of the generator; published turbos take four or eight


def add_algorithm_arguments(parser):
    g = parser.add_argument_group("Algorithm 1")
    g.add_argument(
        "--preset",
        choices=list(METHODS),
        help="a method of the family, as defaults of the arguments below (quote 'di*')",
    )
    g.add_argument(
        "--pair_steps", type=natural, default=0,
        help="before all else: generator steps of regression on pairs (z, x0) of the reference's own sampler, which "
        "keeps its variety",
    )  # fmt: skip
    g.add_argument("--num_pairs", type=positive_int, default=4096, help="pairs that are drawn, once")
    g.add_argument(
        "--pair_sampler_steps", type=positive_int, default=25, help="steps of the reference's sampler for a pair"
    )
    g.add_argument("--pair_cfg_scale", type=non_negative, default=4.5, help="guidance of the reference for pairs")
    g.add_argument("--pair_learning_rate", type=positive, help="of the regression; default: --learning_rate")
    g.add_argument(
        "--pair_folder", type=text,
        help="where pairs are kept, also for later runs with the same reference, sampler, guidance and size; default: "
        "pairs in --output_dir",
    )  # fmt: skip
    g.add_argument("--pretrain_steps", type=natural, default=0, help="generator steps of distillation, without reward")
    g.add_argument(
        "--pretrain_cfg_scale",
        type=non_negative,
        default=1.5,
        help="guidance α_cfg of the reference while pretraining",
    )
    g.add_argument("--max_train_steps", type=natural, default=1000, help="generator steps of alignment")
    g.add_argument(
        "--anchor_scale", type=non_negative, default=0.0,
        help="how hard pairs hold the generator near what the reference draws from the same noise, in all of its "
        "steps, beside a divergence of 1; 0: not at all",
    )  # fmt: skip
    g.add_argument(
        "--norm_guard", type=non_negative, default=0.0,
        help="how hard what the teaching assistant predicts of the generator's pictures is held to be no longer, in "
        "norm, than what the guided reference does: a brake against rewards that saturate; 0: not at all",
    )  # fmt: skip
    g.add_argument("--reward_scale", type=non_negative, default=10.0, help="α_rew; the paper's: 0, 1, 10")
    g.add_argument(
        "--reward_ratio", type=positive,
        help="instead: α_rew such that the reward pulls so many times as hard as the divergence, as measured in the "
        "first steps of alignment, in which it is 0, when the teaching assistant has caught up",
    )  # fmt: skip
    g.add_argument(
        "--reward_ratio_steps", type=positive_int, default=10,
        help="steps that --reward_ratio measures; they are doubled while the divergence's pull still grows by more "
        "than a tenth, up to a quarter of --max_train_steps",
    )  # fmt: skip
    g.add_argument(
        "--cfg_scale", type=non_negative, default=4.5,
        help="α_cfg, guidance of the reference as uncond + α (cond − uncond): 1 is none; the paper's: 1, 4.5",
    )  # fmt: skip
    g.add_argument(
        "--cfg_interval", type=fraction, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="fractions of the schedule between which guidance acts; at other noise levels it is 1",
    )  # fmt: skip
    g.add_argument(
        "--divergence", choices=["ikl", "score"], default="ikl",
        help="from the reference: the integral KL (DI, DI++, DIDR) or a distance of scores (SIM, DI*), which takes "
        "gradients through both networks: more memory and time",
    )  # fmt: skip
    g.add_argument("--score_distance", choices=DISTANCES, default="pseudo_huber", help="d(y) of --divergence score")
    g.add_argument(
        "--huber_c", type=positive, default=0.01, help="c/√d of the pseudo-Huber distance sqrt(‖y‖² + c²) − c"
    )
    g.add_argument(
        "--score_guidance", choices=["inside", "outside"], default="inside",
        help="--cfg_scale within the distance of scores, or beside it as the implicit reward that it is in the IKL",
    )  # fmt: skip
    g.add_argument(
        "--reward_mode", choices=["clean", "diffused", "surrogate"], default="clean",
        help="reward of the generated image; or (DIDR) of what the reference makes of it from every noise level; or "
        "of a third network that learns the reward from its numbers alone. With the last two --reward_scale is the "
        "exponent of the tilted target p_ref exp(α_rew r), whatever w(t)",
    )  # fmt: skip
    g.add_argument(
        "--diffused_reward_steps", type=positive_int, default=1, help="k, denoising steps of --reward_mode diffused"
    )
    g.add_argument(
        "--surrogate_group", type=whole(2), default=4,
        help="n, pictures of a prompt whose scores the surrogate compares, at n noise levels each",
    )  # fmt: skip
    g.add_argument(
        "--ta_steps",
        type=positive_int,
        default=1,
        help="K_TA, steps of the teaching assistant for one of the generator",
    )
    g.add_argument(
        "--ta_warmup_steps", type=natural, default=0, help="steps of the teaching assistant before the first one"
    )
    g.add_argument(
        "--reuse_generated", action=BooleanOptionalAction, default=False,
        help="the generator's step takes the pictures on which the teaching assistant has learnt in the same "
        "iteration: a pass less, and their graph is held meanwhile",
    )  # fmt: skip
    g.add_argument(
        "--weighting", choices=WEIGHTINGS,
        help="w(t) of the divergence; default: dmd, but x0 for the pseudo-Huber distance, whose pull on each sample "
        "is normalised already",
    )  # fmt: skip
    g.add_argument(
        "--min_timestep", type=fraction, default=0.02, help="π(t) starts here, as a fraction of the schedule"
    )
    g.add_argument(
        "--timestep_shift", type=positive, default=1.0,
        help="of flow matching: π(t) is of σ = s u / (1 + (s − 1) u), u uniform; s > 1 looks more at much noise",
    )  # fmt: skip
    g.add_argument("--max_timestep", type=fraction, default=0.98, help="π(t) ends here, as a fraction of the schedule")


def add_reward_arguments(parser):
    g = parser.add_argument_group("reward")
    g.add_argument(
        "--reward", type=text, nargs="+", metavar="NAME[:WEIGHT]",
        help=f"r(x, c), the weighted sum of: {', '.join(CATALOGUE)}, your own as path/to/file.py:function, or a "
        "judge's URL http://host:port/path; none: no reward, where --reward_scale is 0; default: image_reward, or "
        "none where it is 0",
    )  # fmt: skip
    g.add_argument(
        "--heldout_reward",
        type=text,
        nargs="+",
        metavar="NAME",
        help="scorers that are only reported, never trained on",
    )
    g.add_argument(
        "--reward_checkpoint",
        type=text,
        nargs="+",
        metavar="NAME=PATH",
        help="local files or folders, instead of the Hub's",
    )
    add_judges_arguments(g)
    g.add_argument("--reward_dtype", choices=["fp32", "bf16"], default="fp32", help="of the rewards' networks")
    g.add_argument(
        "--reward_batch_size", type=positive_int, help="images decoded and scored at a time; default: the whole batch"
    )
    g.add_argument(
        "--reward_decoder",
        type=text,
        help="Hub id or folder of an AutoencoderTiny (TAESD) to decode with, instead of the VAE",
    )
    g.add_argument(
        "--reward_warmup_steps", type=natural, default=0, help="α_rew rises from 0 over so many steps of alignment"
    )
    g.add_argument(
        "--reward_cap",
        type=text,
        nargs="+",
        metavar="NAME=VALUE",
        help="a reward above this value is not pursued any further",
    )
    g.add_argument(
        "--reward_standardize", type=text, nargs="+", metavar="NAME",
        help="rewards that count as (r − mean) / spread, both over pictures that the generator makes of training "
        "prompts as the run begins: for scores without bounds, as hpsv3's",
    )  # fmt: skip
    g.add_argument(
        "--heldout_patience", type=natural, default=0,
        help="stop when the first held-out reward was below its best in so many validations in a row; 0: never",
    )  # fmt: skip


def add_judges_arguments(g):
    """Of judges elsewhere; `evaluate_one_step.py` has them, too."""
    g.add_argument(
        "--reward_timeout", type=positive, default=60.0,
        help="seconds that a judge at a URL may take to answer for a batch",
    )  # fmt: skip
    g.add_argument(
        "--reward_retries", type=natural, default=5,
        help="how often it is asked again if it does not, with pauses of 2, 4, 8, ... 60 seconds",
    )  # fmt: skip
