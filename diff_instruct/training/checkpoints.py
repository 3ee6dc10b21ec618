"""Checkpoints that are whole or absent, and the state of the loop that goes into them."""

import json
import os
import re
import shutil
from pathlib import Path

from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diff_instruct.mistake import Mistake


def list_checkpoints(output_dir):
    """Finished checkpoints, oldest first; one that was interrupted while it was written has another name."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(output_dir, resume_from_checkpoint):
    """The folder that `--resume_from_checkpoint` (a path, or "latest" in the output folder) means.

    Raises:
        Mistake: if there is none.
    """
    if resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise Mistake(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}")
        return checkpoints[-1]
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if (path / "loop-0.json").is_file():
            return path
    raise Mistake(f"--resume_from_checkpoint: {resume_from_checkpoint} is not a finished checkpoint")


def save_trained_weights_only(accelerator):
    """Let `save_state` keep only what is trained (LoRA: not the base), under names without wrappers' prefixes.

    FSDP shards its own files and is left alone.
    """

    def trained_names(model):
        return {n for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}

    def save_hook(models, weights, output_dir):
        for model, state in zip(models, weights):
            names = trained_names(model)
            kept = {k.removeprefix("module."): v for k, v in state.items() if k.removeprefix("module.") in names}
            state.clear()
            state.update(kept)

    def load_hook(models, input_dir):
        for i, model in enumerate(models):
            state = load_file(Path(input_dir) / (f"model_{i}.safetensors" if i else "model.safetensors"))
            if state.keys() != trained_names(model):
                raise Mistake(f"{input_dir} was written with other networks or another --ta_lora_rank")
            accelerator.unwrap_model(model).load_state_dict(state, strict=False)
        models.clear()

    if accelerator.distributed_type != DistributedType.FSDP:
        accelerator.register_save_state_pre_hook(save_hook)
        accelerator.register_load_state_pre_hook(load_hook)


def save_checkpoint(accelerator, output_dir, step, loop_state, ema=None, total_limit=None):
    """Write checkpoint-<step> beside its place, then rename it; keep the newest `total_limit`.

    Args:
        loop_state (`dict`): this process's plain numbers, saved as JSON.
        ema ([`EMAModel`], *optional*): the generator's average, saved as safetensors.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = Path(output_dir) / f"partial-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    (partial / f"loop-{accelerator.process_index}.json").write_text(json.dumps(loop_state))
    if ema is not None and accelerator.is_main_process:
        averages = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        save_file(averages, partial / "ema.safetensors", metadata={"optimization_step": str(ema.optimization_step)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, path, ema=None):
    """Restore networks, optimizers, learning-rate schedules and `ema`; returns this process's `loop_state`."""
    accelerator.load_state(str(path))
    state = json.loads((Path(path) / f"loop-{accelerator.process_index}.json").read_text())
    if ema is not None:
        with safe_open(Path(path) / "ema.safetensors", framework="pt") as f:
            for i, p in enumerate(ema.shadow_params):
                p.copy_(f.get_tensor(str(i)))
            ema.optimization_step = int(f.metadata()["optimization_step"])
    return state
