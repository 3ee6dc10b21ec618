"""The command line of `train_diff_instruct_pp.py`: parsed, completed, and checked as far as no model is needed."""

import json
import os
import sys
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from diff_instruct.command_line import Parser
from diff_instruct.mistake import Mistake
from diff_instruct.rewards.specs import NO_REWARD, read_rewards
from diff_instruct.training import algorithm_arguments as algorithm
from diff_instruct.training import argument_groups as groups
from diff_instruct.training.algorithm_arguments import MAX_STEPS
from diff_instruct.training.methods import METHODS
from diff_instruct.training.output_folder import check_output_dir


POCKET = Path(__file__).resolve().parents[2] / "pocket"


def pocket_defaults(preset):
    """What the bare command uses: the embedded pocket reference and the settings that suit its size.

    Returns:
        (defaults, those that win over the preset's: the papers' numbers are for large models).
    """
    settings = json.loads((POCKET / "defaults.json").read_text())
    paths = {"pretrained_model_name_or_path": "reference", "pretrained_generator_name_or_path": "generator"}
    prompts = {"train_prompts": "prompts_train.txt", "eval_prompts": "prompts_heldout.txt"}
    own = settings.pop("presets").get(preset, {})
    files = {**paths, **prompts, "validation_images": "real"}
    return {**{k: str(POCKET / v) for k, v in files.items()}, **settings}, own


def build_parser():
    """All arguments; the defaults are those for real models (the paper's, where it gives them)."""
    parser = Parser(
        "Distil a text-to-image diffusion model into a one-step generator and align it (Diff-Instruct++). "
        "Without --pretrained_model_name_or_path it runs on the embedded pocket reference, with its defaults."
    )
    groups.add_model_arguments(parser)
    groups.add_prompt_arguments(parser)
    algorithm.add_algorithm_arguments(parser)
    algorithm.add_reward_arguments(parser)
    groups.add_optimization_arguments(parser)
    groups.add_output_arguments(parser)
    return parser


def parse_args(input_args=None):
    """Parse, complete and check.

    Defaults are the parser's, then the pocket's if no model is named, then the preset's, then what is given.
    `reward_scale` is None with `--reward_ratio`: it is measured. `--hub_token` moves to HF_TOKEN, where
    huggingface_hub looks for it, out of the arguments and `sys.argv`.

    Raises:
        Mistake: one line that says what to do, for a mistake that can be seen without loading a model.
    """
    parser = build_parser()
    given = parser.parse_args(input_args)
    on_pocket, own = given.pretrained_model_name_or_path is None, {}
    if on_pocket:
        defaults, own = pocket_defaults(given.preset)
        parser.set_defaults(**defaults)
    if given.preset is not None:
        parser.set_defaults(**{**METHODS[given.preset].defaults, **own})
    if given.reward_ratio is not None:
        parser.set_defaults(reward_scale=None)
    args = parser.parse_args(input_args)
    if args.weighting is None:
        args.weighting = "x0" if args.divergence == "score" and args.score_distance == "pseudo_huber" else "dmd"
    if on_pocket and given.pretrained_generator_lora:
        args.pretrained_generator_name_or_path = given.pretrained_generator_name_or_path
    if on_pocket and (given.dataset_name or given.train_prompts):  # one's own prompts: judge with those, too
        args.train_prompts, args.eval_prompts = given.train_prompts, given.eval_prompts
    if on_pocket and given.heldout_reward is None and args.eval_prompts != parser.get_default("eval_prompts"):
        args.heldout_reward = [name for name in args.heldout_reward if name != "pocket_truth"]  # of its sentences only
    if args.resolution is not None and len(args.resolution) == 1:
        (args.resolution,) = args.resolution
    if args.reward is None:
        args.reward = [NO_REWARD] if args.reward_scale == 0 else ["image_reward"]
    if args.hub_token is not None:
        os.environ["HF_TOKEN"] = args.hub_token
    del args.hub_token  # nothing that records the arguments can keep it
    if input_args is None:
        sys.argv[1:] = without_token(sys.argv[1:])
    check_args(args)
    return args


def without_token(words):
    """A command line without `--hub_token` and its value."""
    flag = "--hub_token"
    hidden = [word.split("=")[0] == flag or before == flag for before, word in zip(["", *words], words)]
    return [word for word, hide in zip(words, hidden) if not hide]


def check_args(args):
    """Raises Mistake, in one line, for arguments that cannot work together or files that are not there."""
    if (args.dataset_name is None) == (args.train_prompts is None):
        raise Mistake("give either --dataset_name or --train_prompts (a file or folder of prompts)")
    if args.reward_ratio is not None and args.reward_scale is not None:
        raise Mistake("give either --reward_scale or --reward_ratio, which measures it")
    if args.reward_ratio is not None and args.reward_mode != "clean":
        raise Mistake(
            f"--reward_ratio needs --reward_mode clean: a {args.reward_mode} reward weighs as its exponent says"
        )
    if args.divergence == "score" and args.reward_mode == "diffused":
        raise Mistake("--reward_mode diffused needs --divergence ikl: inside a distance it takes second derivatives")
    if args.divergence == "score" and args.reward_mode == "surrogate":
        raise Mistake("--reward_mode surrogate needs --divergence ikl: it is a difference of scores, as that is")
    if args.reward_mode == "surrogate" and args.train_batch_size % args.surrogate_group:
        raise Mistake(
            f"--train_batch_size {args.train_batch_size} must be a multiple of --surrogate_group "
            f"{args.surrogate_group}, the pictures of a prompt that are compared"
        )
    if args.reward == [NO_REWARD] and args.reward_scale != 0:
        given = "no --reward_ratio, but --reward_scale 0" if args.reward_ratio is not None else "--reward_scale 0"
        raise Mistake(f"--reward {NO_REWARD} needs {given}: give that, or a reward")
    if args.lora_target_modules and not (args.lora_rank or args.ta_lora_rank):
        raise Mistake("--lora_target_modules names what gets adapters: give --lora_rank or --ta_lora_rank, too")
    for alpha in ("lora_alpha", "ta_lora_alpha", "surrogate_lora_alpha"):
        rank = alpha.replace("alpha", "rank")
        if getattr(args, alpha) and not getattr(args, rank):
            raise Mistake(f"--{alpha} scales a LoRA: give --{rank}, too")
    if args.memory_gib and not args.dry_run:
        raise Mistake("--memory_gib is answered before anything is trained: give --dry_run, too")
    if not args.min_timestep < args.max_timestep:
        raise Mistake("--min_timestep must be less than --max_timestep")
    if not args.cfg_interval[0] < args.cfg_interval[1]:
        raise Mistake("--cfg_interval: the first fraction must be less than the second")
    check_tracker(args.report_to)
    check_steps(args)
    _, heldout = read_rewards(args)
    if args.heldout_patience and not (heldout and args.validation_steps):
        raise Mistake("--heldout_patience needs a --heldout_reward, and --validation_steps to judge it at")
    for name in ("train_prompts", "eval_prompts", "validation_images"):
        path = getattr(args, name)
        if path is not None and not Path(path).exists():
            raise Mistake(f"--{name}: no such file or folder: {path}")
    check_output_dir(args)


def check_tracker(name):
    """Raises Mistake for a tracker that is unknown or not installed: accelerate would log nothing, silently."""
    if name in ("none", "all") or name in [tracker.value for tracker in get_available_trackers()]:
        return
    if name in LoggerType.list():
        raise Mistake(f"--report_to {name}: its package is missing: pip install {name}")
    raise Mistake(f"--report_to {name}: take tensorboard, wandb, trackio, all or none")


def check_steps(args):
    """Raises Mistake, in one line, for --generator_steps and --timestep that cannot be, whatever the generator."""
    if args.timestep is None:
        return
    n, named = len(args.timestep), " ".join(map(str, args.timestep))
    if n > MAX_STEPS:
        raise Mistake(f"--timestep {named} are {n} steps, but the generator takes at most {MAX_STEPS}")
    if n > 1 and args.generator_steps not in (None, n):
        raise Mistake(f"--timestep {named} are {n} steps, but --generator_steps is {args.generator_steps}")
    if any(later >= t for t, later in zip(args.timestep, args.timestep[1:])):
        raise Mistake(f"--timestep {named} must descend: the first step is the one with the most noise")
