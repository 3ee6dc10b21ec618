"""LoRA by peft, in any of the networks: named adapters in one base, who of them acts, merged."""

import copy
import re
import warnings
from functools import partial
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint

from diff_instruct.mistake import Mistake
from diff_instruct.models.published import Stored, stored_state
from diff_instruct.models.sharding import whole


ALL = "all"  # of `--lora_target_modules`: each linear layer and each convolution that is not grouped
LAYERS = WeakKeyDictionary()  # what `lora_layers` has found, by module


def lora_targets(words, family, network):
    """The layers that get adapters, as peft's `target_modules`: those that `--lora_target_modules` names, by the ends
    of their names or by one regular expression of whole names; "all" of them; by default the family's.

    Raises:
        Mistake: for words that name no layer, or something else, too: a block or what else holds layers.
    """
    if words is None:
        return family.lora_targets
    modules = dict(network.named_modules())
    layers = [name for name, m in modules.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    if words == [ALL]:
        return tuple(name for name in layers if getattr(modules[name], "groups", 1) == 1)
    one_pattern = len(words) == 1 and not re.fullmatch(r"[\w.]+", words[0])
    for word in words:
        try:
            named = [m for m in modules if (re.fullmatch(word, m) if one_pattern else f".{m}".endswith(f".{word}"))]
        except re.error as error:
            raise Mistake(f"--lora_target_modules {word} is no regular expression: {error}") from None
        others = [name for name in named if name not in layers]
        if len(others) == len(named):
            raise Mistake(
                f"--lora_target_modules {word} is the name of no layer of a {type(network).__name__}, such as "
                f"{layers[len(layers) // 2]}"
            )
        if others:
            raise Mistake(
                f"--lora_target_modules {word} also names {others[0]}, a {type(modules[others[0]]).__name__}, which "
                "gets no adapters: name linear layers and convolutions alone, such as "
                f"{next(name for name in named if name in layers)}"
            )
    return words[0] if one_pattern else tuple(words)


def reach(network, targets):
    """(number of layers, share of the network's parameters) that adapters reach; the network is left as it is."""
    network = copy.deepcopy(network)
    total = sum(p.numel() for p in network.parameters())
    layers = lora_layers(add_lora(network, "counted", 1, None, targets))
    return len(layers), sum(p.numel() for layer in layers for p in layer.get_base_layer().parameters()) / total


def add_lora(network, name, rank, alpha, targets):
    """Freeze a network and put float32 adapters, which start as zero, into its layers; returns it.

    Works on the network itself, PixArt's included, which has no `add_adapter`. Adapters of other names may be there.

    Args:
        name: of the adapters, "generator" or "ta".
        targets: as peft's `target_modules`: ends of the names of the layers, or one regular expression of whole names.
    """
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets)
    counted = all(p.is_meta for p in network.parameters())  # then adapters need no contents, either
    with warnings.catch_warnings():  # that there are adapters already is what is wanted
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=counted)
    LAYERS.clear()
    network.requires_grad_(False)
    for p in trained_parameters(network, name).values():
        p.data = p.data.float()
    return network


def trained_parameters(network, adapter=None):
    """What is trained of a network, by name: its adapters of this name, or all of it."""
    parameters = dict(network.named_parameters())
    return parameters if adapter is None else {k: p for k, p in parameters.items() if f".{adapter}." in k}


def lora_layers(network):
    """The layers that adapters are in; found once, since walking a network takes longer than switching it."""
    if network not in LAYERS:
        LAYERS[network] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    return LAYERS[network]


class acting:
    """Within: the adapters of this name act in the layers; none of them, so the base alone, if it is None.

    Which parameters require a gradient does not change: peft's own switches set that, too, parameter by parameter, and
    so take a thousand times as long (`benchmarks/role_switch.py`). What a layer's pass reads is written here directly.

    Raises:
        RuntimeError: if this version of peft reads something else.
    """

    def __init__(self, layers, name):
        self.layers, self.name = layers, name

    def __enter__(self):
        self.before = [(layer.active_adapter, layer.disable_adapters) for layer in self.layers]
        active, disabled = [self.name], self.name is None
        for layer in self.layers:
            state = vars(layer)
            state["_disable_adapters"] = disabled
            if not disabled:
                state["_active_adapter"] = active
        for layer in self.layers[:1]:
            if layer.disable_adapters != disabled or not disabled and layer.active_adapters != active:
                raise RuntimeError("this version of peft keeps elsewhere which adapters act: take peft 0.17 to 0.21")

    def __exit__(self, *_):
        for layer, (active, disabled) in zip(self.layers, self.before):
            vars(layer).update(_active_adapter=active, _disable_adapters=disabled)


def checkpoint_network(network, family):
    """Gradient checkpointing of a network's blocks: those that diffusers checkpoints, and those that it leaves out
    though they hold much (the family's `left_out`)."""
    network.enable_gradient_checkpointing(family.checkpointed(checkpoint_block))
    for blocks in family.left_out:
        for block in network.get_submodule(blocks):
            block.forward = partial(checkpoint_block, block.forward)


def checkpoint_block(block, *args, **kwargs):
    """Gradient checkpointing for `enable_gradient_checkpointing`, where one network acts in several roles.

    The backward pass computes the block again; that must happen with adapters as they were in the forward pass, not as
    they are then, or the gradient is silently that of another role.

    Args:
        block: the module, or its method that is called.
    """
    layers = lora_layers(getattr(block, "__self__", block))
    role = None
    if layers and not layers[0].disable_adapters:
        role = layers[0].active_adapters[0]
    contexts = lambda: (acting([], None), acting(layers, role))  # noqa: E731
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class Merged:
    """A float32 weight of a network with adapters merged into it; calling it makes the tensor.

    Of a sharded network all processes call it, and each gets the whole tensor.
    """

    def __init__(self, weight, layer=None, adapter=None):
        self.weight, self.layer, self.adapter, self.shape = weight, layer, adapter, weight.shape

    @torch.no_grad()
    def __call__(self):
        weight = self.weight() if isinstance(self.weight, Stored) else whole(self.weight.detach())
        weight = weight.float()
        return weight if self.layer is None else weight + whole(self.layer.get_delta_weight(self.adapter)).to(weight)


def unadapted(network):
    """The state of the plain network that adapters are in: name to [`Merged`] of the weight alone. Of a rounded one
    these are the published weights, never what they were rounded to."""
    if getattr(network, "published", None) is not None:
        return {k: Merged(v) for k, v in stored_state(network).items()}
    return {k.replace(".base_layer", ""): Merged(v) for k, v in network.state_dict().items() if ".lora_" not in k}


def merged(network, adapter):
    """The state of a plain network of the same class, the adapters, if any, added to its weights: name to [`Merged`].

    Nothing is computed before a tensor is asked for, so a network larger than what is free can be written to a file.
    Of a rounded network the weights are those of `unadapted`, as they are published.
    """
    state = unadapted(network)
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            key = f"{name}.weight"
            state[key] = Merged(state[key].weight, layer, adapter)
    return state
