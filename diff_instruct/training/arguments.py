"""Command-line arguments of `train_diff_instruct_pp.py`, and the checks that need no model."""

import argparse
import json
import os
import shlex
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from diff_instruct.mistake import Mistake
from diff_instruct.objectives import DISTANCES, WEIGHTINGS
from diff_instruct.rewards.loading import REWARDS, check_rewards
from diff_instruct.training.methods import PRESETS


MAX_STEPS = 4  # of the generator; DMD2's and DIDR's best models use up to so many
POCKET = Path(__file__).resolve().parents[2] / "pocket"


def pocket_defaults():
    """What the bare command uses: the embedded pocket reference and the settings that suit its size."""
    settings = json.loads((POCKET / "defaults.json").read_text())
    paths = {"pretrained_model_name_or_path": "reference", "pretrained_generator_name_or_path": "generator"}
    prompts = {"train_prompts": "prompts_train.txt", "eval_prompts": "prompts_heldout.txt"}
    return {**{k: str(POCKET / v) for k, v in {**paths, **prompts}.items()}, **settings}


def build_parser():
    """All arguments; the defaults are those for real models (the paper's, where it gives them)."""
    parser = argparse.ArgumentParser(
        description="Distil a text-to-image diffusion model into a one-step generator and align it (Diff-Instruct++). "
        "Without --pretrained_model_name_or_path it runs on the embedded pocket reference, with its defaults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    yes_no = argparse.BooleanOptionalAction

    g = parser.add_argument_group("models")
    g.add_argument("--pretrained_model_name_or_path", help="the reference: Hub id or folder of a diffusers pipeline")
    g.add_argument(
        "--pretrained_generator_name_or_path",
        help="one-step model to start from: a pipeline or its network alone (Hub id or folder), or one .safetensors "
        "or .bin file (on the Hub: owner/name/file); without it the generator starts as the reference",
    )
    g.add_argument("--revision", help="revision of the reference on the Hub")
    g.add_argument("--variant", help="variant of the reference's files, for example fp16")
    g.add_argument("--cache_dir", help="where downloads are kept")
    g.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="another VAE with the same latents, for example one that is stable in bf16",
    )
    g.add_argument(
        "--input_noise",
        choices=["unit", "scaled"],
        help="what enters at t*: z, or σ_t z (SIM, SiD-LSG); default: the generator's own, else unit",
    )
    g.add_argument(
        "--timestep",
        type=int,
        nargs="+",
        help="t*, where the generator is evaluated; default: the generator's own; if it starts as the reference: "
        "400 (PixArt-α), 625 (Stable Diffusion), 399 (SDXL); or one for each step, descending",
    )
    g.add_argument(
        "--generator_steps", type=int,
        help=f"n, evaluations for an image, at most {MAX_STEPS}; default: as many as --timestep or the generator's "
        "config names, which is 1 if neither names several; from a single t* they are at t* (n − k)/n, k = 0..n − 1",
    )  # fmt: skip
    g.add_argument("--resolution", type=int, help="pixels of an image's side; default: the reference's")

    g = parser.add_argument_group("prompts")
    g.add_argument("--dataset_name", help="Hub id of a dataset with prompts; it is streamed")
    g.add_argument("--dataset_config_name", help="configuration of that dataset")
    g.add_argument("--dataset_split", default="train", help="split of that dataset")
    g.add_argument("--train_prompts", help="instead: a .txt .csv .tsv .jsonl .json .parquet file, or a folder of them")
    g.add_argument("--caption_column", help="column with the prompts; may be left out if there is only one")
    g.add_argument("--max_train_samples", type=int, help="use only the first so many prompts")
    g.add_argument(
        "--shuffle_buffer_size", type=int, default=10_000, help="prompts among which the stream is shuffled"
    )
    g.add_argument(
        "--eval_prompts", help="file of prompts to judge with; default: every 20th training prompt is held out"
    )
    g.add_argument("--prompt_cache", help="folder that keeps the prompts' embeddings, for this run and later ones")
    g.add_argument(
        "--offload_text_encoder",
        action="store_true",
        help="text encoders on the CPU but for the encoding of new prompts",
    )
    g.add_argument("--num_eval_prompts", type=int, default=64, help="how many prompts are judged, at most")
    g.add_argument("--num_eval_images", type=int, default=4, help="images (seeds) for each of them; at least 2")
    g.add_argument("--validation_prompts", nargs="+", help="prompts to draw; default: the first few eval prompts")
    g.add_argument(
        "--num_validation_prompts",
        type=int,
        default=8,
        help="how many of those are drawn without --validation_prompts",
    )
    g.add_argument("--validation_steps", type=int, default=100, help="draw and judge every so many steps; 0: never")

    g = parser.add_argument_group("Algorithm 1")
    g.add_argument(
        "--preset", choices=PRESETS, help="a method of the family, as defaults of the arguments below (quote 'di*')"
    )
    g.add_argument("--pretrain_steps", type=int, default=0, help="generator steps of distillation, without reward")
    g.add_argument(
        "--pretrain_cfg_scale", type=float, default=1.5, help="guidance α_cfg of the reference while pretraining"
    )
    g.add_argument("--max_train_steps", type=int, default=1000, help="generator steps of alignment")
    g.add_argument("--reward_scale", type=float, default=10.0, help="α_rew; the paper's: 0, 1, 10")
    g.add_argument(
        "--cfg_scale", type=float, default=4.5,
        help="α_cfg, guidance of the reference as uncond + α (cond − uncond): 1 is none; the paper's: 1, 4.5",
    )  # fmt: skip
    g.add_argument(
        "--divergence", choices=["ikl", "score"], default="ikl",
        help="from the reference: the integral KL (DI, DI++, DIDR) or a distance of scores (SIM, DI*), which takes "
        "gradients through both networks: more memory and time",
    )  # fmt: skip
    g.add_argument("--score_distance", choices=DISTANCES, default="pseudo_huber", help="d(y) of --divergence score")
    g.add_argument("--huber_c", type=float, default=0.01, help="c/√d of the pseudo-Huber distance sqrt(‖y‖² + c²) − c")
    g.add_argument(
        "--score_guidance", choices=["inside", "outside"], default="inside",
        help="--cfg_scale within the distance of scores, or beside it as the implicit reward that it is in the IKL",
    )  # fmt: skip
    g.add_argument(
        "--reward_mode", choices=["clean", "diffused"], default="clean",
        help="reward of the generated image, or (DIDR) of what the reference makes of it from every noise level; then "
        "--reward_scale is the exponent of the tilted target p_ref exp(α_rew r), whatever w(t)",
    )  # fmt: skip
    g.add_argument("--diffused_reward_steps", type=int, default=1, help="k, denoising steps of --reward_mode diffused")
    g.add_argument(
        "--ta_steps", type=int, default=1, help="K_TA, steps of the teaching assistant for one of the generator"
    )
    g.add_argument(
        "--ta_warmup_steps", type=int, default=0, help="steps of the teaching assistant before the first one"
    )
    g.add_argument("--weighting", choices=WEIGHTINGS, default="dmd", help="w(t) of the integral KL")
    g.add_argument("--min_timestep", type=float, default=0.02, help="π(t) starts here, as a fraction of the schedule")
    g.add_argument("--max_timestep", type=float, default=0.98, help="π(t) ends here, as a fraction of the schedule")

    g = parser.add_argument_group("reward")
    g.add_argument(
        "--reward", nargs="+", default=["image_reward"], metavar="NAME[:WEIGHT]",
        help=f"r(x, c), the weighted sum of: {', '.join(REWARDS)}, or your own as path/to/file.py:function",
    )  # fmt: skip
    g.add_argument(
        "--heldout_reward", nargs="+", metavar="NAME", help="scorers that are only reported, never trained on"
    )
    g.add_argument(
        "--reward_checkpoint", nargs="+", metavar="NAME=PATH", help="local files or folders, instead of the Hub's"
    )
    g.add_argument("--reward_dtype", choices=["fp32", "bf16"], default="fp32", help="of the rewards' networks")
    g.add_argument(
        "--reward_batch_size", type=int, help="images decoded and scored at a time; default: the whole batch"
    )
    g.add_argument(
        "--reward_decoder", help="Hub id or folder of an AutoencoderTiny (TAESD) to decode with, instead of the VAE"
    )
    g.add_argument(
        "--reward_warmup_steps", type=int, default=0, help="α_rew rises from 0 over so many steps of alignment"
    )
    g.add_argument(
        "--reward_cap", nargs="+", metavar="NAME=VALUE", help="a reward above this value is not pursued any further"
    )
    g.add_argument(
        "--heldout_patience", type=int, default=0,
        help="stop when the first held-out reward was below its best in so many validations in a row; 0: never",
    )  # fmt: skip

    g = parser.add_argument_group("optimization")
    g.add_argument("--train_batch_size", type=int, default=16, help="images per process and forward pass")
    g.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    g.add_argument("--learning_rate", type=float, default=5e-6, help="of the generator")
    g.add_argument("--ta_learning_rate", type=float, help="of the teaching assistant; default: as the generator")
    g.add_argument("--lora_rank", type=int, default=0, help="train the generator as LoRA; 0: all of it")
    g.add_argument("--lora_alpha", type=float, help="LoRA scale of the generator; default: the rank")
    g.add_argument("--ta_lora_rank", type=int, default=0, help="train the TA as LoRA on the reference; 0: a full copy")
    g.add_argument("--ta_lora_alpha", type=float, help="LoRA scale; default: the rank")
    g.add_argument("--lr_scheduler", default="constant", help="any of diffusers' schedules")
    g.add_argument("--lr_warmup_steps", type=int, default=0)
    g.add_argument("--adam_beta1", type=float, default=0.0)
    g.add_argument("--adam_beta2", type=float, default=0.999)
    g.add_argument("--adam_weight_decay", type=float, default=0.0)
    g.add_argument("--adam_epsilon", type=float, default=1e-8)
    g.add_argument("--max_grad_norm", type=float, default=10.0)
    g.add_argument("--use_ema", action=yes_no, default=True, help="judge and export an average of the generator")
    g.add_argument("--ema_decay", type=float, default=0.95, help="of the average, per step, while aligning")
    g.add_argument("--ema_halflife", type=float, default=50_000, help="of the average, in images, while pretraining")
    g.add_argument(
        "--ema_rampup_ratio", type=float, default=0.05, help="the half-life is at most this part of the images seen"
    )
    g.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory, more time; also in the VAE's decoder"
    )
    g.add_argument("--mixed_precision", choices=["no", "bf16"], help="default: what accelerate is configured for")
    g.add_argument("--use_8bit_adam", action="store_true", help="optimizers of bitsandbytes: a quarter of the memory")
    g.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers (UNets)"
    )
    g.add_argument("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and newer")

    g = parser.add_argument_group("output")
    g.add_argument("--dry_run", action="store_true", help="check, print the memory that each actor needs, and stop")
    g.add_argument("--output_dir", default="diff-instruct-pp", help="the exported pipeline, checkpoints and logs")
    g.add_argument("--seed", type=int, default=0, help="of every random number of the run")
    g.add_argument("--checkpointing_steps", type=int, default=500, help="checkpoint every so many steps; 0: never")
    g.add_argument("--checkpoints_total_limit", type=int, help="keep only so many")
    g.add_argument("--resume_from_checkpoint", help='a checkpoint, or "latest"')
    g.add_argument("--logging_steps", type=int, default=10, help="log figures every so many steps")
    g.add_argument("--logging_dir", default="logs", help="tracker logs, inside --output_dir")
    g.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, all or none")
    g.add_argument("--tracker_project_name", default="diff-instruct-pp")
    g.add_argument("--push_to_hub", action="store_true", help="upload the exported pipeline")
    g.add_argument("--hub_private_repo", action="store_true", help="create that repository as a private one")
    g.add_argument("--hub_model_id", help="repository to upload to; default: the name of --output_dir")
    g.add_argument("--hub_token", help="token for the Hub; default: the one you logged in with")
    return parser


def parse_args(input_args=None):
    """Parse and check.

    Raises:
        Mistake: one line that says what to do, for a mistake that can be seen without loading a model.
    """
    parser = build_parser()
    given = parser.parse_args(input_args)
    if given.pretrained_model_name_or_path is None:
        parser.set_defaults(**pocket_defaults())
    parser.set_defaults(**PRESETS.get(given.preset, {}))
    args = parser.parse_args(input_args)
    if given.pretrained_model_name_or_path is None:
        if given.dataset_name or given.train_prompts:  # one's own prompts: judge with those, too
            args.train_prompts, args.eval_prompts = given.train_prompts, given.eval_prompts
    check_args(args)
    return args


def trackable(args):
    """The arguments without the token, as trackers and the summary take them; a list as one would type it."""
    shown = {k: v for k, v in vars(args).items() if k != "hub_token"}
    text = {k: shlex.join(map(str, v)) if isinstance(v, list) else v for k, v in shown.items()}
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in text.items()}


def check_args(args):
    """Raises Mistake, in one line, for arguments that cannot work together or files that are not there."""
    if (args.dataset_name is None) == (args.train_prompts is None):
        raise Mistake("give either --dataset_name or --train_prompts (a file or folder of prompts)")
    for name in ("pretrain_steps", "max_train_steps", "ta_warmup_steps", "lora_rank", "ta_lora_rank"):
        if getattr(args, name) < 0:
            raise Mistake(f"--{name} must not be negative")
    if args.reward_batch_size is not None and args.reward_batch_size < 1:
        raise Mistake("--reward_batch_size must be at least 1")
    at_least_one = ("ta_steps", "train_batch_size", "gradient_accumulation_steps", "num_eval_prompts", "logging_steps")
    for name in (*at_least_one, "diffused_reward_steps"):
        if getattr(args, name) < 1:
            raise Mistake(f"--{name} must be at least 1")
    if args.num_eval_images < 2:
        raise Mistake("--num_eval_images must be at least 2: diversity is measured between images of one prompt")
    for name in ("learning_rate", "ta_learning_rate"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise Mistake(f"--{name} must be positive")
    if args.huber_c <= 0:
        raise Mistake("--huber_c must be positive: at 0 the distance has no gradient where the scores agree")
    if args.divergence == "score" and args.reward_mode == "diffused":
        raise Mistake("--reward_mode diffused needs --divergence ikl: inside a distance it takes second derivatives")
    if not 0 <= args.min_timestep < args.max_timestep <= 1:
        raise Mistake("need 0 <= --min_timestep < --max_timestep <= 1")
    check_tracker(args.report_to)
    check_steps(args)
    check_rewards(args)
    for name in ("train_prompts", "eval_prompts"):
        path = getattr(args, name)
        if path is not None and not Path(path).exists():
            raise Mistake(f"--{name}: no such file or folder: {path}")
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from None
    if not os.access(args.output_dir, os.W_OK):
        raise Mistake(f"--output_dir {args.output_dir} is not writable")


def check_tracker(name):
    """Raises Mistake for a tracker that is unknown or not installed: accelerate would log nothing, silently."""
    if name in ("none", "all") or name in [tracker.value for tracker in get_available_trackers()]:
        return
    if name in LoggerType.list():
        raise Mistake(f"--report_to {name}: its package is missing: pip install {name}")
    raise Mistake(f"--report_to {name}: take tensorboard, wandb, trackio, all or none")


def check_steps(args):
    """Raises Mistake, in one line, for --generator_steps and --timestep that cannot be, whatever the generator."""
    if args.generator_steps is not None and not 1 <= args.generator_steps <= MAX_STEPS:
        raise Mistake(f"--generator_steps must be 1 to {MAX_STEPS}, but is {args.generator_steps}")
    if args.timestep is None:
        return
    n, named = len(args.timestep), " ".join(map(str, args.timestep))
    if n > MAX_STEPS:
        raise Mistake(f"--timestep {named} are {n} steps, but the generator takes at most {MAX_STEPS}")
    if n > 1 and args.generator_steps not in (None, n):
        raise Mistake(f"--timestep {named} are {n} steps, but --generator_steps is {args.generator_steps}")
    if any(later >= t for t, later in zip(args.timestep, args.timestep[1:])):
        raise Mistake(f"--timestep {named} must descend: the first step is the one with the most noise")
