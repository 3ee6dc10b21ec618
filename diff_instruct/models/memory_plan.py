"""How much memory a run needs for its networks and optimizers, before anything is loaded."""

import copy

from diff_instruct.models.activations import REWARDS, activations
from diff_instruct.models.lora import add_lora, trained_parameters
from diff_instruct.models.sharding import processes
from diff_instruct.rewards.specs import read_rewards


GIB = 2**30
ON_TOP = "Activations, the reward and the images in flight come on top; --dry_run --memory_gib 24 predicts them."


def count(parameters):
    """Number of elements."""
    return sum(p.numel() for p in parameters)


def plan(args, models, mixed_precision):
    """Bytes by actor, for one process: with DDP every process needs as much, with FSDP2 this is its share.

    Activations, the reward and the images in flight come on top: see `peak`.

    Args:
        models ([`Models`]): what is known of them.
        mixed_precision (`str`): "no" or "bf16", which what is frozen is kept in.

    Text encoders and the average count unless they are on the CPU (`--offload_text_encoder`, `--prompt_cache`;
    `--offload_ema`).

    Returns:
        `dict`: actor to its bytes: `weights`, `gradients`, `optimizer` and `ema`.
    """
    frozen, adam = 2 if mixed_precision == "bf16" else 4, 2 if args.use_8bit_adam else 8
    reference, away = models.networks[models.denoiser], args.prompt_cache or args.offload_text_encoder
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

    sharded = {
        # LoRA is on the reference's own weights, unless the generator starts from others
        "generator": trained(
            args.lora_rank, frozen * n if models.generator else 0, args.use_ema and not args.offload_ema
        ),
        "teaching assistant": trained(args.ta_lora_rank, 0, False),
        "reference": held(n),
    }
    return {
        **{actor: {k: v // processes() for k, v in row.items()} for actor, row in sharded.items()},
        **{
            k: held(count(v.parameters()))
            for k, v in models.networks.items()
            if k != models.denoiser and not (away and k.startswith("text_encoder"))
        },
    }


def reward_bytes(args):
    """Weights of the rewards that are trained on and reported, as far as their sizes are known beforehand."""
    trained, heldout = ([REWARDS.get(spec.name, (0, 0))[0] for spec in specs] for specs in read_rewards(args))
    return (2 if args.reward_dtype == "bf16" else 4) * sum(trained) + 4 * sum(heldout)


def peak(args, models, mixed_precision):
    """(phase that needs most, its bytes): what is held all the time, and what that phase adds at its highest.

    Raises:
        Mistake: see `activations`.
    """
    rows = plan(args, models, mixed_precision).values()
    held = sum(row["weights"] + row["optimizer"] + row["ema"] for row in rows) + reward_bytes(args)
    phases = activations(args, models, mixed_precision)
    phase = max(phases, key=phases.get)
    return phase, held + phases[phase]


LEVERS = (
    ("gradient_checkpointing", True),
    ("reward_batch_size", 1),
    ("reward_dtype", "bf16"),
    ("offload_text_encoder", True),
    ("offload_ema", True),
    ("use_8bit_adam", True),
    ("ta_lora_rank", 64),
    ("lora_rank", 64),
)  # those first that cost the result least


def advice(args, models, mixed_precision, memory_gib):
    """One line that says whether a run fits into so many GiB: the largest batch, or the flags that make it fit."""
    asked, words = copy.copy(args), []
    phase, need = peak(asked, models, mixed_precision)
    line = f"Predicted peak, in the {phase}: {need / GIB:.2f} GiB. "
    if need <= memory_gib * GIB:
        larger = copy.copy(args)
        larger.train_batch_size = 2 * args.train_batch_size
        each = max(1, peak(larger, models, mixed_precision)[1] - need) / args.train_batch_size
        batch = args.train_batch_size + int((memory_gib * GIB - need) / each)
        return f"{line}It fits into {memory_gib:g} GiB, and so does a batch of about {batch}."
    for flag, value in LEVERS:
        if (
            getattr(asked, flag) not in (None, False, 0, "fp32")
            or flag == "reward_batch_size"
            and args.train_batch_size == 1
        ):
            continue
        setattr(asked, flag, value)
        words.append(f"--{flag}" if value is True else f"--{flag} {value}")
        need = peak(asked, models, mixed_precision)[1]
        if need <= memory_gib * GIB:
            return f"{line}It fits into {memory_gib:g} GiB with {' '.join(words)}: {need / GIB:.2f} GiB."
    return f"{line}It does not fit into {memory_gib:g} GiB: {need / GIB:.2f} GiB even with {' '.join(words)}."


def table(bytes_by_actor):
    """The plan as lines of text, in GiB."""
    columns = ("weights", "gradients", "optimizer", "ema")
    lines = [f"{'GiB':<20}" + "".join(f"{c:>11}" for c in (*columns, "sum"))]
    rows = {k: [v[c] for c in columns] for k, v in bytes_by_actor.items()}
    rows["sum"] = [sum(column) for column in zip(*rows.values())]
    for name, row in rows.items():
        lines.append(f"{name:<20}" + "".join(f"{x / GIB:>11.2f}" for x in (*row, sum(row))))
    return "\n".join(lines) + f"\n{ON_TOP}"
