"""How much memory a run needs for its networks and optimizers, before anything is loaded."""

import copy

from diff_instruct.models.lora import add_lora, trained_parameters


GIB = 2**30


def count(parameters):
    """Number of elements."""
    return sum(p.numel() for p in parameters)


def plan(args, models, mixed_precision):
    """Bytes by actor, for one process (with DDP every process needs as much).

    Activations, the reward and the images in flight come on top: they depend on the batch, and on
    `--gradient_checkpointing` and `--reward_batch_size`.

    Args:
        models ([`Models`]): what is known of them.
        mixed_precision (`str`): "no" or "bf16", which what is frozen is kept in.

    Returns:
        `dict`: actor to its bytes: `weights`, `gradients`, `optimizer` and `ema`.
    """
    frozen, adam = 2 if mixed_precision == "bf16" else 4, 2 if args.use_8bit_adam else 8
    reference = models.networks[models.denoiser]
    n = count(reference.parameters())

    def trained(lora_rank, base_bytes, ema):
        weights, k = 4 * n, n
        if lora_rank:
            adapted = add_lora(copy.deepcopy(reference), "counted", lora_rank, None, models.family.lora_targets)
            k = count(trained_parameters(adapted, "counted").values())
            weights = base_bytes + 4 * k
        return {"weights": weights, "gradients": 4 * k, "optimizer": adam * k, "ema": 4 * k if ema else 0}

    def held(parameters):
        return {"weights": frozen * parameters, "gradients": 0, "optimizer": 0, "ema": 0}

    return {
        # LoRA is on the reference's own weights, unless the generator starts from others
        "generator": trained(args.lora_rank, frozen * n if models.generator else 0, args.use_ema),
        "teaching assistant": trained(args.ta_lora_rank, 0, False),
        "reference": held(n),
        **{k: held(count(v.parameters())) for k, v in models.networks.items() if k != models.denoiser},
    }


def table(bytes_by_actor):
    """The plan as lines of text, in GiB."""
    columns = ("weights", "gradients", "optimizer", "ema")
    lines = [f"{'GiB':<20}" + "".join(f"{c:>11}" for c in (*columns, "sum"))]
    rows = {k: [v[c] for c in columns] for k, v in bytes_by_actor.items()}
    rows["sum"] = [sum(column) for column in zip(*rows.values())]
    for name, row in rows.items():
        lines.append(f"{name:<20}" + "".join(f"{x / GIB:>11.2f}" for x in (*row, sum(row))))
    return "\n".join(lines) + "\nActivations, the reward and the images in flight come on top."
