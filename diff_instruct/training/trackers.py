"""The trackers' run, in which a resumed run goes on."""

import secrets
from pathlib import Path

from diff_instruct.files import NotWritten, write_text, writing
from diff_instruct.training.record import arguments_of


RUN_ID = "tracker_run_id"


def start_trackers(accelerator, args, checkpoint=None):
    """Start them, or go on in the run that the checkpoint's folder belongs to: its id is in `tracker_run_id`.

    Weights & Biases go on by id, Trackio by name; TensorBoard reads all files of the folder that it writes to.
    """
    file = Path(args.output_dir) / RUN_ID
    before = checkpoint and checkpoint.parent / RUN_ID
    run = before.read_text().strip() if before and before.is_file() else None
    run = run or f"{args.run_name or Path(args.output_dir).resolve().name}-{secrets.token_hex(4)}"
    if accelerator.is_main_process:
        write_text(file, run + "\n")
    group = {} if args.tracker_group is None else {"group": args.tracker_group}
    options = {
        "wandb": {"id": run, "name": args.run_name or run, "resume": "allow", **group},
        "trackio": {"name": run, "resume": "allow", **group},
    }
    accelerator.init_trackers(args.tracker_project_name, config=arguments_of(args), init_kwargs=options)


def end_trackers(accelerator):
    """Let them write what they hold; a tracker that cannot is told, and ends no run."""
    try:
        with writing():
            accelerator.end_training()
    except NotWritten as error:
        accelerator.print(f"a tracker could not write all: {error}")
