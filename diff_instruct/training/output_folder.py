"""Where a run writes: no other run's work is overwritten unless one says so, and nothing is written by a mistake."""

import os
import shutil
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from diff_instruct.export.card import LORA_WEIGHTS
from diff_instruct.files import INDEX, NEW, PARTIAL, check_apart
from diff_instruct.mistake import Mistake
from diff_instruct.models.starts import Lora
from diff_instruct.rewards.specs import files_of, read_rewards
from diff_instruct.training.checkpoints import list_checkpoints


SUMMARY = "training_summary.json"  # what a finished run leaves last
OF_A_RUN = (SUMMARY, "history.jsonl", NEW, PARTIAL)  # one of them shows that a run of the script has written there
EXPORTED = (INDEX, LORA_WEIGHTS, "transformer", "unet", "vae", "text_encoder*", "tokenizer*", "scheduler", "README.md",
            "*.png", "images")  # fmt: skip


def resumes_there(args):
    """Whether the run goes on from a checkpoint of its own output folder: from the one that `--resume_from_checkpoint`
    names, as a path or by its name in the folder, or from the `latest`, if there is one."""
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted is None:
        return False
    checkpoints = [path.resolve() for path in list_checkpoints(folder)]
    if wanted == "latest":
        return bool(checkpoints)
    return Path(wanted).resolve() in checkpoints or (folder / wanted).resolve() in checkpoints


def inputs_of(args):
    """All that the run reads of the user's, as pairs (argument, path or Hub id or None)."""
    names = "pretrained_model_name_or_path pretrained_generator_name_or_path pretrained_vae_model_name_or_path"
    names += " single_file_config reward_decoder train_prompts eval_prompts validation_images dataset_name"
    inputs = [(f"--{name}", getattr(args, name)) for name in names.split()]
    inputs += [("--validation_prompts", word) for word in args.validation_prompts or []]
    for name in ("reference_lora", "pretrained_generator_lora"):
        words = getattr(args, name)
        inputs.append((f"--{name}", words and Lora.parse(words).path))
    return [*inputs, *files_of(sum(read_rewards(args), ()), args.reward_checkpoint)]


def check_inputs_stay(args):
    """Raises Mistake if something would be written where an input lies, or over what no run has written."""
    folder = Path(args.output_dir)
    logs, cache = ("--logging_dir", folder / args.logging_dir), ("--prompt_cache", args.prompt_cache)
    pairs = ("--pair_folder", args.pair_folder)
    kept = [cache, pairs, ("--cache_dir", args.cache_dir or HF_HUB_CACHE)]
    resumed = args.resume_from_checkpoint
    if resumed and Path(resumed).exists() and not resumes_there(args):
        kept.append(("--resume_from_checkpoint", resumed))
    check_apart([("--output_dir", folder), logs, cache, pairs], inputs_of(args), kept)
    if not list_checkpoints(folder) and not any((folder / name).exists() for name in OF_A_RUN):
        found = next((path.name for pattern in EXPORTED for path in sorted(folder.glob(pattern))), None)
        if found:
            raise Mistake(
                f"--output_dir {folder} holds {found}, which no run of this script wrote: take another folder"
            )


def check_writable(what, folder):
    """Raises Mistake if a folder cannot be made or written to; `what` is the argument that names it."""
    folder = Path(folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise Mistake(f"{what} {folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Mistake(f"{what} {folder} is not writable: {there} belongs to someone else")


def check_output_dir(args):
    """Whether `--output_dir` can be made and written to, as what else the run writes to, is no input, and is free.
    Writes nothing.

    A folder is taken if it holds a finished run or checkpoints, unless `--resume_from_checkpoint` goes on from one of
    these, `--overwrite_output_dir` is given, or nothing is trained (`--dry_run`).

    Raises:
        Mistake: if not.
    """
    folder = Path(args.output_dir)
    for name in ("output_dir", "prompt_cache", "pair_folder"):
        if getattr(args, name) is not None:
            check_writable(f"--{name}", getattr(args, name))
    check_inputs_stay(args)
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise Mistake("--overwrite_output_dir starts anew and --resume_from_checkpoint goes on: give one of them")
    if args.overwrite_output_dir or args.dry_run or resumes_there(args):
        return
    checkpoints, finished = list_checkpoints(folder), (folder / SUMMARY).exists()
    if checkpoints or finished:
        held = ", ".join(["a finished run"] * finished + [path.name for path in checkpoints[-1:]])
        go_on = "--resume_from_checkpoint latest to go on, " if checkpoints else ""
        raise Mistake(
            f"--output_dir {folder} holds {held}: take another folder, {go_on}or --overwrite_output_dir to start anew"
        )


def prepare_output_dir(args):
    """Make `--output_dir`; with `--overwrite_output_dir` delete the checkpoints and the summary of the run before,
    which `latest` would take for this one's. One process calls it.

    Raises:
        Mistake: if it cannot be made.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output_dir {folder} cannot be made: {error.strerror}") from None
    if args.overwrite_output_dir:
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        (folder / SUMMARY).unlink(missing_ok=True)
