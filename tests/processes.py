"""Runs in processes of their own, which can be killed: forked from a server that has imported everything already."""

import gc
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch

import evaluate_one_step
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.endings import run_to_the_end
from train_diff_instruct_pp import main


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes"])


gc.freeze()  # in the server that preloads this module, too: see tests/conftest.py


def train(arguments):
    """The training script, as its last lines run it; returns the exit code."""
    return run_to_the_end(lambda: parse_args(arguments), main)


def evaluate(arguments):
    evaluate_one_step.main(evaluate_one_step.build_parser().parse_args(arguments))
    return 0


def work(script, arguments, log, environment, before):
    os.environ.update(environment)
    with open(log, "a") as f:
        for descriptor in (1, 2):
            os.dup2(f.fileno(), descriptor)
    torch.set_num_threads(1)  # and it stays so: tiny networks on busy machines wait long for a second thread
    torch.set_num_threads = lambda n: None
    before()
    sys.exit(script(arguments))


def ranks(processes):
    """The environment of each of several processes (gloo), on the CPU; for one, without ranks."""
    environment = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return [environment]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    environment["LOCAL_WORLD_SIZE"] = str(processes)
    return [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class Run:
    """A run that was started, of one process or several (gloo); `log` collects what it prints.

    `environment` is added to that of each process, which calls `before()` first, then `script(arguments)`.
    """

    def __init__(self, arguments, log, processes=1, environment=None, before=dict, script=train):
        arguments = [str(a) for a in arguments]
        self.log, self.processes = Path(log), []
        for rank in ranks(processes):
            mine = rank | (environment or {})
            process = CONTEXT.Process(target=work, args=(script, arguments, str(log), mine, before))
            process.start()
            self.processes.append(process)

    @property
    def alive(self):
        return all(p.is_alive() for p in self.processes)

    def kill(self):
        """SIGKILL to all."""
        for p in self.processes:
            p.kill()
        self.wait()

    def signal(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout=300):
        """Exit codes of all, negative for signals."""
        end = time.monotonic() + timeout
        for p in self.processes:
            p.join(max(0, end - time.monotonic()))
            if p.is_alive():
                for other in self.processes:
                    other.kill()
                raise TimeoutError(self.log.read_text()[-3000:])
        return [p.exitcode for p in self.processes]
