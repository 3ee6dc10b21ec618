"""Generators that start as adapters on the reference's own weights: as a LoRA of the reference, such as a turbo's, or
as the closest one to a turbo in full."""

import re
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from diff_instruct.models.lora import lora_layers, unadapted
from diff_instruct.models.published import empty_like, weight_reader


START = "start"  # the name of the adapters while they are read
FEW = 4  # below 1 / FEW of a matrix's own rank, it is decomposed by random projections (Halko et al., arXiv 0909.4061)


def targets_with(targets, layers):
    """peft's `target_modules` that reach, beside `targets`, these layers, too."""
    if isinstance(targets, str):
        return "|".join([f"(?:{targets})", *map(re.escape, layers)])
    return tuple(dict.fromkeys([*targets, *layers]))


def without_weights(network):
    """The same network whose weights take no memory: all zero, in float32, so that adapters read into it are exact."""
    network = empty_like(network, torch.float32)
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return network


def read_adapters(lora, stock, denoiser):
    """The adapters of LoRA weights by layer, (A, B), float32, with α and scale in B: the weight's change is B A.

    The libraries read them, whatever their names are (diffusers', peft's, kohya's), into a network without weights.

    Args:
        lora ([`Lora`]): for the network of the name `denoiser` of the pipeline `stock`, which stays as it is.
    """
    network = getattr(stock, denoiser)
    empty = without_weights(network)
    if lora.peft_config is not None:
        PeftModel.from_pretrained(empty, lora.path, adapter_name=START, cache_dir=lora.cache_dir)
    else:
        setattr(stock, denoiser, empty)
        try:
            stock.load_lora_weights(lora.path, cache_dir=lora.cache_dir, adapter_name=START)
        finally:
            setattr(stock, denoiser, network)
    found = {}
    for name, layer in empty.named_modules():
        if layer in lora_layers(empty) and START in layer.lora_A:
            a, b = (part[START].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
            found[name] = a, b * (layer.scaling[START] * lora.scale)
    return found


@torch.no_grad()
def start_adapters(network, name, adapters):
    """Let the adapters of this name begin as those of `read_adapters`, of their rank or a lower one.

    The rest of the rank begins as adapters do, without any effect.
    """
    for layer_name, (a, b) in adapters.items():
        layer = network.get_submodule(layer_name)
        own_a, own_b, rank = layer.lora_A[name].weight, layer.lora_B[name].weight, len(a)
        own_a[:rank] = a.to(own_a)
        own_b[:, :rank] = (b / layer.scaling[name]).to(own_b)


def begin(models, roles, network, stock, device, is_main=True):
    """Let the generator's adapters begin as what [`Models`] names: as LoRA weights, or as the closest to a network in
    full, if it has no base of its own.

    Returns:
        Lines that say what is kept of it; none where all is.
    """
    if models.start is not None:
        start_adapters(network, "generator", read_adapters(models.start, stock, models.denoiser))
    if models.generator is None or roles[0].base == roles[0].name:
        return ()
    full = weight_reader(models.generator, models.denoiser)
    return words_of(start_as_closest(network, "generator", full, device, is_main), models.generator.path)


class Change(NamedTuple):
    """A weight's difference: its sum of squares, and that of what is missing of it; whether it has adapters; and
    whether it could."""

    size: float
    missing: float
    carried: bool
    in_layer: bool


@torch.no_grad()
def start_as_closest(network, name, full, device, is_main=True):
    """Let the adapters of this name begin as the closest ones to a network in full, layer by layer.

    The difference is taken, one tensor at a time, from the base as it is exported: from the published weights, where
    it is rounded.

    Args:
        full: function of a weight's name and shape that reads it.
        device: where differences are decomposed.

    Returns:
        `dict`: name of each weight to its [`Change`].
    """
    layers = {f"{key}.weight": m for key, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    adapted = {f"{key}.weight": m for key, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
    layers = {key.replace(".base_layer", "") for key in layers if ".lora_" not in key}
    changes = {}
    for key, weight in tqdm(unadapted(network).items(), desc="the generator as LoRA", disable=not is_main):
        rest = full(key, weight.shape).to(device, torch.float32) - weight().to(device)
        size, layer = sum_of_squares(rest), adapted.get(key)
        carried = layer is not None and name in layer.lora_A and getattr(layer.get_base_layer(), "groups", 1) == 1
        if size and carried:
            a, b = low_rank(rest.flatten(1), layer.r[name])
            own_a, own_b = layer.lora_A[name].weight, layer.lora_B[name].weight
            own_a[: len(a)] = a.view(len(a), *own_a.shape[1:]).to(own_a)
            own_b[:, : len(a)] = (b / layer.scaling[name]).view(len(b), len(a), *own_b.shape[2:]).to(own_b)
            rest -= (b @ a).view_as(rest)
        changes[key] = Change(size, sum_of_squares(rest), carried, key in layers)
    return changes


def sum_of_squares(tensor):
    return float(tensor.square().sum(dtype=torch.float64))


def low_rank(matrix, rank):
    """(A, B), (k, n) and (m, k), of the product B A closest to a matrix (m, n) in sum of squares, k ≤ rank: its
    singular value decomposition, cut, with the root of the singular values in both.

    For a small rank it is that of twice as many random projections, after six power iterations: with singular values
    that fall as k^(−1/4) it keeps at least 99.7% of what can be kept, and more where they fall faster.
    """
    if rank * FEW < min(matrix.shape):
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=2 * rank + 8, niter=6)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    k = min(rank, int((s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum()))  # A and B of 0 would stay 0
    a, b = s[:k, None].sqrt() * v[:, :k].T, u[:, :k] * s[:k].sqrt()
    if torch.distributed.is_initialized():  # all processes start alike, however their devices round
        a, b = a.contiguous(), b.contiguous()
        torch.distributed.broadcast(a, 0)
        torch.distributed.broadcast(b, 0)
    return a, b


def words_of(changes, path):
    """What a LoRA has of a difference, a line; and a line of what it has not, if there is such."""
    changed = {key: change for key, change in changes.items() if change.size}
    total = sum(change.size for change in changed.values())
    if not total:
        return [f"{path} has the reference's weights: its LoRA begins without effect."]
    carried = {key: change for key, change in changed.items() if change.carried}
    kept = sum(change.size - change.missing for change in carried.values())
    line = f"The generator starts as the LoRA that is closest to {path}: it has {kept / total:.1%} of the difference "
    line += "from the reference (sum of squares of all weights)"
    if carried:
        share = {key: 1 - change.missing / change.size for key, change in carried.items()}
        least = min(share, key=share.get)
        line += f"; {kept / sum(change.size for change in carried.values()):.1%} within the {len(carried)} layers "
        line += f"that have adapters, the least, {share[least]:.1%}, in {least.removesuffix('.weight')}"
    others = [change for change in changed.values() if not change.carried]
    if not others:
        return [line + "."]
    in_layers, parts = sum(change.in_layer for change in others), []
    if in_layers:
        parts.append(f"{in_layers} layers without adapters (--lora_target_modules all gives them some)")
    if in_layers < len(others):
        parts.append(f"{len(others) - in_layers} biases, norms and other parameters that LoRA cannot carry")
    left = sum(change.size for change in others) / total
    return [line + ".", f"Not in it: {left:.1%}, of {' and '.join(parts)}."]
