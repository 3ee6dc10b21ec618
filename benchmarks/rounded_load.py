"""What a rounded base needs while it is loaded: `OMP_NUM_THREADS=1 python benchmarks/rounded_load.py sdxl nf4`

Writes the denoiser of an architecture with random bfloat16 weights to a folder, tensor by tensor; then, in a process
of its own, loads it rounded. Printed are the weights before and after, the largest tensor, and the highest resident
memory (VmHWM) above that of the process before it loads, as a ratio to rounded weights and largest tensor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights

from diff_instruct.families import FAMILIES
from diff_instruct.models.published import Published, load_rounded, shards
from diff_instruct.models.rounding import rounding, stored_bytes
from diff_instruct.models.sources import ModelSource
from diff_instruct.models.tensors import save_network


GIB = 2**30
ARCHITECTURES = Path(__file__).resolve().parent / "architectures"
NETWORKS = {  # folder, family, changes of the config
    "sdxl": ("stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", {}),
    "flux": ("FLUX.1-dev", "FluxPipeline", {"num_layers": 2, "num_single_layers": 4}),
}


class Random:
    """A tensor that is drawn when it is asked for."""

    def __init__(self, like):
        self.shape = like.shape

    def __call__(self):
        return torch.randn(self.shape, dtype=torch.bfloat16).mul_(0.02)


def empty(name):
    """(family, network on the meta device)."""
    folder, family, changes = NETWORKS[name]
    family = FAMILIES[family]
    class_name = json.loads((ARCHITECTURES / folder / "model_index.json").read_text())[family.denoiser][1]
    cls = getattr(diffusers, class_name)
    config = {**cls.load_config(ARCHITECTURES / folder, subfolder=family.denoiser), **changes}
    with init_empty_weights():
        return family, cls.from_config(config)


def highest():
    """VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def load(name, kind, folder):
    """Load, and print what it took."""
    family, network = empty(name)
    plan, sizes = rounding(family, network, kind), [p.numel() for p in network.parameters()]
    published = Published(shards(ModelSource(str(folder)), ""))
    if kind == "nf4":
        import bitsandbytes  # noqa: F401, what the library itself takes does not count
    before, start = highest(), time.process_time()
    loaded = load_rounded(network, plan, published, torch.bfloat16)
    rounded, largest, peak = stored_bytes(loaded, 2), 2 * max(sizes), highest() - before
    gib = {"bf16": 2 * sum(sizes), "rounded": rounded, "largest tensor": largest, "peak": peak}
    row = {"network": name, "kind": kind, **{f"{k}, GiB": round(v / GIB, 3) for k, v in gib.items()}}
    row |= {"peak ÷ (rounded + largest)": round(peak / (rounded + largest), 3)}
    print(json.dumps(row | {"processor seconds": round(time.process_time() - start)}, ensure_ascii=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("kind", choices=["int8", "nf4"], nargs="+")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # what the second process is told
    args = parser.parse_args()
    if args.folder:
        return load(args.network, args.kind[0], args.folder)
    with tempfile.TemporaryDirectory() as folder:
        network = empty(args.network)[1]
        state = {name: Random(p) for name, p in network.state_dict().items()}
        save_network(network, folder, state, torch.bfloat16)
        for kind in args.kind:
            command = [sys.executable, __file__, args.network, kind, "--folder", folder]
            large = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
            subprocess.run(command, check=True, env={**os.environ, **large})


if __name__ == "__main__":
    main()
