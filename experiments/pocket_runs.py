"""Runs of the training script side by side on the pocket reference, kept under the name of their arguments.

`five_settings.py`, `five_methods.py`, `one_change.py` and `timesteps.py` say which runs. Every run starts from the
committed one-step generator, unless said otherwise, and differs in its arguments and its seed only. Finished runs are
kept in the work directory, and are not made again, whichever script asks for them. `pocket_judge` judges them,
`pocket_tables` tables and draws them.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from queue import Queue

from tqdm.auto import tqdm

from diff_instruct.training.environment import usable_cores


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "train_diff_instruct_pp.py"
COMMON = (
    "--validation_steps 25 --num_eval_prompts 16 --logging_steps 5 "
    "--checkpointing_steps 25 --checkpoints_total_limit 1"
)


def parser(description):
    """The arguments that all of them take."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--max_train_steps", type=int, default=50, help="generator steps of every run")
    p.add_argument("--seeds", type=int, default=3, help="of every run; seeds that are there already count, too")
    p.add_argument("--work_dir", default=str(ROOT / "pocket-build" / "runs"), help="where runs are kept")
    p.add_argument("--at_once", type=int, default=usable_cores(), help="runs side by side, one thread each")
    return p


def setting(cfg_scale, reward_scale, cfg_interval="0 1", changes=""):
    """The arguments of (α_cfg, α_rew), guided at all noise levels, as in the papers, unless said otherwise; None: at
    the pocket's own."""
    guided = f" --cfg_interval {cfg_interval}" if cfg_scale != 1 and cfg_interval else ""  # α_cfg 1 is no guidance
    return f"--cfg_scale {cfg_scale} --reward_scale {reward_scale}{guided} {changes}".rstrip()


def folder_of(arguments, args, seed):
    """Where the run is kept: `--cfg_scale 1 --reward_scale 0` with seed 2 in `cfg_scale-1-reward_scale-0-2`."""
    name = re.sub(r"[^\w.+*]+", "-", f"{arguments} {seed}").strip("-").replace("*", "star")
    return Path(args.work_dir) / f"{args.max_train_steps}-steps" / name


def finished(arguments, args):
    """Folders of the runs with these arguments, seed 0 first, be they more than `args.seeds` or fewer."""
    folders = (folder_of(arguments, args, seed) for seed in count())
    return list(takewhile(lambda folder: (folder / "training_summary.json").exists(), folders))


@contextmanager
def core_of(cores):
    """A core out of the queue, and back into it."""
    core = cores.get()
    try:
        yield core
    finally:
        cores.put(core)


def train(settings, args, script=SCRIPT):
    """Train the arguments of all `settings` with every seed, each run on a core of its own."""
    common = f"--max_train_steps {args.max_train_steps} {COMMON}"
    jobs = {
        folder_of(arguments, args, seed): f"--seed {seed} {common} {arguments}"
        for seed in range(args.seeds)
        for arguments in settings.values()
    }
    train_in(jobs, args.at_once, script)


def train_in(jobs, at_once, script=SCRIPT):
    """The training script with the arguments of every folder in `jobs`, unless it has finished there. The processor
    time of what ran last in a folder is kept beside it, in seconds.

    Raises:
        RuntimeError: if a run fails; no more are begun then.
    """
    pinned = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = Queue()
    for k in range(at_once):
        cores.put(pinned[k % len(pinned)] if pinned else None)

    def one(folder, arguments):
        if not (folder / "training_summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, script, "--output_dir", str(folder), *arguments.split()]
            resume = ["--resume_from_checkpoint", "latest"] if list(folder.glob("checkpoint-*")) else []
            with (folder / "log.txt").open("a") as log, core_of(cores) as core:
                run = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=log, stderr=log)
                if core is not None:
                    os.sched_setaffinity(run.pid, {core})
                _, status, used = os.wait4(run.pid, 0)
                run.returncode = os.waitstatus_to_exitcode(status)
                if run.returncode:
                    raise RuntimeError(f"{shlex.join(command)} failed; see {folder}/log.txt")
            (folder / "processor_seconds.txt").write_text(f"{used.ru_utime + used.ru_stime:.1f}\n")
        bar.update()

    with tqdm(total=len(jobs), desc="runs") as bar, ThreadPoolExecutor(at_once) as pool:
        try:
            for job in [pool.submit(one, *job) for job in jobs.items()]:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure no more are begun
