"""Checkpoints that are whole or absent, and the state of the loop that goes into them."""

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from accelerate.utils import load
from safetensors import SafetensorError
from safetensors.torch import load_file

from diff_instruct.files import NotWritten, flush, writing
from diff_instruct.mistake import Mistake
from diff_instruct.models.tensors import write_files
from diff_instruct.training.record import arguments_of, prompts_of


FORMAT = 4  # one more with each argument that changes what is trained: an older checkpoint does not record it
MANIFEST = "checkpoint.json"
FREE = set(  # arguments that a resumed run may have others of: they do not change what is trained
    "preset output_dir overwrite_output_dir max_train_steps max_nonfinite_steps cache_dir prompt_cache dry_run "
    "memory_gib offload_ema validation_images logging_steps logging_dir report_to tracker_project_name run_name "
    "tracker_group allow_bad_rows checkpointing_steps checkpoints_total_limit resume_from_checkpoint "
    "pair_folder reward_timeout reward_retries push_to_hub hub_private_repo hub_model_id".split()
)
SHARED = "train_batch_size", "gradient_accumulation_steps"  # times the number of processes: a step's images


def number_of(checkpoint):
    """The step in its name."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(output_dir):
    """Finished checkpoints, oldest first; one that was interrupted while it was written has another name.

    A checkpoint that was being replaced by another one of the same step is found where it was put aside.
    """
    found = [p for p in Path(output_dir).glob("*checkpoint-*") if re.fullmatch(r"(old-)?checkpoint-\d+", p.name)]
    found = [p for p in found if not (p.name.startswith("old-") and p.with_name(p.name[4:]).exists())]
    return sorted(found, key=number_of)


def find_checkpoint(output_dir, resume_from_checkpoint):
    """The folder that `--resume_from_checkpoint` means: a path, or "latest" in the output folder.

    None for "latest" if there is none yet: the run then starts, so that one command starts and goes on.

    Raises:
        Mistake: if the one that is named is not there.
    """
    there = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return there[-1] if there else None
    for path in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if path.is_dir() and not path.name.startswith("partial-"):
            return path
    names = ", ".join(p.name for p in there) or "none"
    raise Mistake(
        f"--resume_from_checkpoint: {resume_from_checkpoint} is not a finished checkpoint; {output_dir} has: {names}"
    )


def fault(path):
    """Why a folder is no whole checkpoint that this version can read, in words; None if it is one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written by this script, or by one of another version"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if version != FORMAT:
        return f"it has format {version}, and this version of the script reads {FORMAT}"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} of {size} bytes"
    return None


def check_checkpoint(path, args, num_processes):
    """Whether the run can go on from it exactly: it is whole, and was written by the same run.

    Raises:
        Mistake: if not; it names the file that is missing, or the arguments that differ.
    """
    why = fault(path)
    if why is not None:
        raise Mistake(f"--resume_from_checkpoint: {path} cannot be used: {why}; name an earlier one, or remove it")
    manifest = json.loads((path / MANIFEST).read_text())
    then, now = manifest["arguments"], arguments_of(args)
    if manifest["processes"] != num_processes:
        before = manifest["processes"] * math.prod(then[k] for k in SHARED)
        here = num_processes * math.prod(now[k] for k in SHARED)
        if before != here:
            raise Mistake(
                f"--resume_from_checkpoint: {path} was written by {manifest['processes']} process(es), but this run "
                f"has {num_processes}: start as many, or choose {' and '.join(f'--{k}' for k in SHARED)} so that a "
                f"step has {before} images, as then, not {here}"
            )
        batches = "gradient_accumulation_steps"
        if isinstance(args.resolution, list) and then[batches] != now[batches]:
            raise Mistake(
                f"--resume_from_checkpoint: {path} was written with --{batches} {then[batches]}, and each batch draws "
                f"one size of --resolution: with {now[batches]} a step would draw others; start "
                f"{manifest['processes']} process(es), as then"
            )
        then = {k: v for k, v in then.items() if k not in SHARED}
    data_then, data_now = manifest["prompts"], prompts_of(args)
    differ = [f"--{k} (then {v}, now {now[k]})" for k, v in then.items() if k in now and differs(k, v, now[k])]
    for name in sorted(data_then.keys() | data_now.keys()):
        a, b = data_then.get(name), data_now.get(name)
        if a != b and not (name == "dataset_name" and None in (a, b)):  # None: the Hub could not be asked
            differ.append(f"--{name} (other contents)")
    if differ:
        raise Mistake(
            f"--resume_from_checkpoint: {path} was written with other arguments: {', '.join(differ)}; give the same, "
            "or start another run in another --output_dir"
        )


def differs(name, then, now):
    """Whether an argument is another one; prompt files are compared by their contents instead."""
    return name not in FREE and name not in ("train_prompts", "eval_prompts") and then != now


def step_of(checkpoint):
    """Where its run stood: negative before the generator's first step of Algorithm 1."""
    return json.loads((checkpoint / MANIFEST).read_text())["step"]


def file_of(folder, trained, what=""):
    """Where a checkpoint keeps what is trained of a network; and, with "_optimizer", its optimizer's tensors."""
    return Path(folder) / f"{trained.name.replace(' ', '_')}{what}.safetensors"


def save_checkpoint(accelerator, args, state):
    """Write checkpoint-<step> beside its place, then rename it; keep `--checkpoints_total_limit`, this one among them.

    If it cannot be written, on any process, it is removed again and a line says so; the earlier ones stay.

    Args:
        state ([`LoopState`]): its numbers are saved as JSON, by each process; of its networks what is trained (LoRA:
            not the base), as safetensors. These files are those of one process, however many write them, and whether
            they hold all of a tensor or shares of it. (A warm-up has made no step of the generator: checkpoint-0.)

    Returns:
        Its path, or None.
    """
    final = Path(args.output_dir) / f"checkpoint-{max(state.step, 0)}"
    partial = final.with_name(f"partial-{final.name}")

    def prepare():
        for stale in final.parent.glob("partial-checkpoint-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)

    def write():
        tensors = {}
        for trained in state.networks:
            tensors[file_of(partial, trained)] = trained.state_dict()
            tensors[file_of(partial, trained, "_optimizer")] = trained.optimizer_state()
        write_files(tensors, accelerator.is_main_process)
        accelerator.save_state(str(partial))  # random numbers
        (partial / f"loop-{accelerator.process_index}.json").write_text(json.dumps(state.state_dict()))

    def finish():
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {"format": FORMAT, "step": state.step, "processes": accelerator.num_processes}
        manifest |= {"arguments": arguments_of(args), "prompts": prompts_of(args), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in (*partial.rglob("*"), partial):
            flush(file)
        put_in_place(partial, final)
        flush(final.parent)
        thin_out(final, args.checkpoints_total_limit)

    for who, act in ((accelerator.is_main_process, prepare), (True, write), (accelerator.is_main_process, finish)):
        why = None
        try:
            if who:
                with writing():
                    act()
        except NotWritten as error:
            why = str(error)
        if fails_anywhere(accelerator, why):
            break
    else:
        return final
    if why is not None:  # on the process that failed
        last = list_checkpoints(args.output_dir)
        print(
            f"{final.name} could not be written: {why}; the last one is {last[-1].name if last else 'none'}.",
            flush=True,
        )
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    return None


def fails_anywhere(accelerator, why):
    """Whether any process has a reason; all wait for it, and get the same answer."""
    failed = torch.tensor(float(why is not None), device=accelerator.device)
    return accelerator.reduce(failed, "sum").item() > 0


def put_in_place(partial, final):
    """Rename; an earlier one of that name (of a warm-up, which has no generator steps) is put aside before."""
    old = final.with_name(f"old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def thin_out(newest, limit):
    """Keep `limit` checkpoints: the newest, then whole ones, those of the most steps."""
    for stale in newest.parent.glob("removed-checkpoint-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if limit is None:
        return
    others = [p for p in list_checkpoints(newest.parent) if p != newest]
    others.sort(key=lambda p: (fault(p) is None, number_of(p)))
    for old in others[: max(0, len(others) - (limit - 1))]:
        removed = old.with_name(f"removed-checkpoint-{number_of(old)}")  # a kill leaves none that is half there
        os.replace(old, removed)
        shutil.rmtree(removed)


def load_checkpoint(accelerator, path, state):
    """Restore a [`LoopState`], its networks, optimizers and learning-rate schedules with it.

    Where there are more processes than wrote it, a further one goes on with the loop of an earlier one, whose state is
    the same on all, and with the random numbers of a new run, from which Algorithm 1 draws nothing.

    Raises:
        Mistake: if a file is damaged, or it was written with other networks.
    """
    try:
        for trained in state.networks:
            trained.load_state_dict(load_file(file_of(path, trained)))
            trained.load_optimizer_state(load_file(file_of(path, trained, "_optimizer")))
        before = json.loads((path / MANIFEST).read_text())["processes"]
        # accelerate reads with weights_only=True; what it does not say is that random numbers could not be read
        if accelerator.process_index < before:
            load(path / f"random_states_{accelerator.process_index}.pkl")
        accelerator.load_state(str(path))
        loop = json.loads((path / f"loop-{accelerator.process_index % before}.json").read_text())
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        line = str(error).split("\n")[0]
        raise Mistake(f"--resume_from_checkpoint: {path} is damaged, or of other networks: {line}") from None
    state.load_state_dict(loop)
