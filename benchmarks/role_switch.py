"""What it costs that one network plays several roles: `OMP_NUM_THREADS=1 python benchmarks/role_switch.py`

The networks have all layers of the real ones, but hardly any width: only their number counts. Two ways to let an
adapter act and to put back what was, in turn, in one process, in processor time (medians):

(a) peft's own switches, with `requires_grad` of every parameter saved and restored, as one would write it;
(b) `diff_instruct.models.lora.acting`.

"all" switches the layers of the network, "blocks" those of its blocks one after the other, as gradient checkpointing
does when it computes them again, the search for a block's layers included. An iteration does "all" five times and
"blocks" twice.
"""

import json
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import diffusers
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer

from diff_instruct.families import FAMILIES
from diff_instruct.models.lora import acting, add_lora, lora_layers


ARCHITECTURES = Path(__file__).resolve().parent / "architectures"
NETWORKS = {
    "SDXL": ("stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", "UNet2DConditionModel"),
    "FLUX.1-dev": ("FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel"),
}


@contextmanager
def by_peft(layers, name):
    """Within: the adapters of this name act in the layers, or none."""
    before = [None if layer.disable_adapters else layer.active_adapters for layer in layers]

    def switch(layer, to):
        flags = [(p, p.requires_grad) for p in layer.parameters()]  # which peft's switches set, too
        layer.enable_adapters(to is not None)
        if to is not None:
            layer.set_adapter(to)
        for p, flag in flags:
            p.requires_grad_(flag)

    for layer in layers:
        switch(layer, name)
    try:
        yield
    finally:
        for layer, to in zip(layers, before):
            switch(layer, to)


def walked(network):
    """The layers that adapters are in, searched anew each time."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def median(function, repeats):
    """Processor seconds of one call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main():
    for name, (folder, family, class_name) in NETWORKS.items():
        cls = getattr(diffusers, class_name)
        with init_empty_weights():
            network = cls.from_config(cls.load_config(ARCHITECTURES / folder, subfolder=FAMILIES[family].denoiser))
        for role in ("ta", "generator"):
            add_lora(network, role, 4, None, FAMILIES[family].lora_targets)
        blocks = [m for m in network.modules() if type(m).__name__ in network._repeated_blocks]

        def switch(way, find, parts):
            for part in parts:
                with way(find(part), "ta"):
                    pass

        row = {"network": name, "layers": len(lora_layers(network)), "blocks": len(blocks)}
        for what, parts in {"all": [network], "blocks": blocks}.items():
            found = {part: walked(part) for part in parts}
            find = found.get if what == "all" else walked
            ours, theirs = [], []
            for _ in range(3):
                theirs.append(median(lambda: switch(by_peft, find, parts), 3))
                ours.append(median(lambda: switch(acting, lora_layers, parts), 50))
            ours, theirs = statistics.median(ours), statistics.median(theirs)
            row |= {f"{what}, ms": round(1000 * ours, 3), f"{what}, by peft ÷ ours": round(theirs / ours)}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
