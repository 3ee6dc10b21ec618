"""Checkpoints that are whole or absent, and the state of the loop that goes into them."""

import json
import os
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from diff_instruct.mistake import Mistake


def list_checkpoints(output_dir):
    """Finished checkpoints, oldest first; one that was interrupted while it was written has another name."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(output_dir, resume_from_checkpoint):
    """The folder that `--resume_from_checkpoint` means: a path, or "latest" in the output folder.

    None for "latest" if there is none yet: the run then starts, so that one command starts and goes on.

    Raises:
        Mistake: if the one that is named is not there.
    """
    if resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if (path / "loop-0.json").is_file():
            return path
    raise Mistake(f"--resume_from_checkpoint: {resume_from_checkpoint} is not a finished checkpoint")


def file_of(folder, trained):
    """Where a checkpoint keeps what is trained of a network."""
    return Path(folder) / f"{trained.name.replace(' ', '_')}.safetensors"


def save_checkpoint(accelerator, output_dir, step, loop_state, networks, total_limit=None):
    """Write checkpoint-<step> beside its place, then rename it; keep the newest `total_limit`.

    Args:
        loop_state (`dict`): this process's plain numbers, saved as JSON.
        networks: the [`Trained`] ones; only what is trained is kept (LoRA: not the base), as safetensors.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = Path(output_dir) / f"partial-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)  # optimizers, learning rates, random numbers
    state = {**loop_state, "networks": [trained.counters() for trained in networks]}
    (partial / f"loop-{accelerator.process_index}.json").write_text(json.dumps(state))
    if accelerator.is_main_process:
        for trained in networks:
            save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, file_of(partial, trained))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        if final.exists():  # checkpoint-0 of a warm-up: there is always a whole one
            old = final.with_name(f"old-{final.name}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old)
        else:
            os.replace(partial, final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, path, networks):
    """Restore networks, optimizers and learning-rate schedules; returns this process's `loop_state`.

    Raises:
        Mistake: if it was written with other networks.
    """
    try:
        for trained in networks:
            trained.load_state_dict(load_file(file_of(path, trained)))
    except (OSError, ValueError) as error:
        raise Mistake(
            f"--resume_from_checkpoint {path} was written with other networks or another --lora_rank, --ta_lora_rank "
            f"or --use_ema: {error}"
        ) from None
    accelerator.load_state(str(path))
    state = json.loads((Path(path) / f"loop-{accelerator.process_index}.json").read_text())
    for trained, counters in zip(networks, state["networks"]):
        trained.load_counters(counters)
    return state
