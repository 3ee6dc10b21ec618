"""How much memory a run needs for its networks and optimizers, before anything is loaded."""

import copy

from diff_instruct.models.lora import add_lora, trained_parameters
from diff_instruct.models.published import rounding_of
from diff_instruct.models.roles import roles_of
from diff_instruct.models.rounding import round_empty, stored_bytes
from diff_instruct.models.sharding import processes
from diff_instruct.plan.activations import activations
from diff_instruct.prompts.encoding import takes_turns
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
    network, away = models.networks[models.denoiser], args.prompt_cache or args.offload_text_encoder
    n, base_bytes = count(network.parameters()), stored_bytes(rounded_base(args, models), frozen)
    counted = {}  # roles whose adapters are alike have as many

    def trained(role):
        if role.in_full or not role.rank:
            return n if role.in_full else 0
        alike = role.rank, str(models.targets_of(role))
        if alike not in counted:
            counted[alike] = adapters(models, role)
        return counted[alike]

    def row(role):
        k = trained(role)
        base = base_bytes if role.base == role.name and not role.in_full else 0
        ema = 4 * k if role.averaged and not args.offload_ema else 0
        return {"weights": base + 4 * k, "gradients": 4 * k, "optimizer": adam * k, "ema": ema}

    def held(parameters):
        return {"weights": frozen * parameters, "gradients": 0, "optimizer": 0, "ema": 0}

    return {
        **{role.title: {k: v // processes() for k, v in row(role).items()} for role in roles_of(args, models)},
        **{
            k: held(count(v.parameters()))
            for k, v in models.networks.items()
            if k != models.denoiser and not (away and k.startswith("text_encoder"))
        },
    }


def copied(models):
    """The reference's network on the meta device, to change; its buffers, which have contents, are shared."""
    network = models.networks[models.denoiser]
    return copy.deepcopy(network, {id(buffer): buffer for buffer in network.buffers()})


def rounded_base(args, models):
    """The same with the layers that `--base_quantization` makes."""
    network = copied(models)
    return round_empty(network, rounding_of(models, args.base_quantization))


def words_of_rounding(args, models):
    """A line that says what of the base is rounded to what, and what loading it takes at its highest."""
    network, sizes = models.networks[models.denoiser], {}
    for name, kind in rounding_of(models, args.base_quantization).items():
        sizes.setdefault(kind, []).append(network.get_submodule(name).weight.numel())
    words = [
        f"{len(n)} layers in {kind} ({sum(n) / count(network.parameters()):.0%} of its weights)"
        for kind, n in sorted(sizes.items())
    ]
    frozen = 2 if args.mixed_precision == "bf16" else 4
    load = stored_bytes(rounded_base(args, models), frozen) + frozen * max(p.numel() for p in network.parameters())
    return (
        f"The base has {' and '.join(words)}; the rest stays as it is. Predicted peak as it loads, tensor by tensor: "
        f"{load / GIB:.2f} GiB"
    )


def adapters(models, role):
    """Number of elements of a role's adapters in the network."""
    network = copied(models)
    add_lora(network, "counted", role.rank, None, models.targets_of(role))
    return count(trained_parameters(network, "counted").values())


def reward_bytes(args):
    """Weights of the rewards that are trained on and reported, as far as their sizes are known beforehand."""
    trained, heldout = (
        sum(spec.published.parameters for spec in specs if spec.published) for specs in read_rewards(args)
    )
    return (2 if args.reward_dtype == "bf16" else 4) * trained + 4 * heldout


def peaks(args, models, mixed_precision):
    """Bytes of each phase of a run at its highest: what is held all the time, and what the phase adds. Text encoders
    that are away come back while prompts are encoded: beside all else, or in the place of the networks (see
    `takes_turns`).

    Raises:
        Mistake: see `activations`.
    """
    rows = plan(args, models, mixed_precision)
    held = sum(row["weights"] + row["optimizer"] + row["ema"] for row in rows.values()) + reward_bytes(args)
    phases = activations(args, models, mixed_precision)
    if args.prompt_cache or args.offload_text_encoder:
        encoders = [network for name, network in models.networks.items() if name.startswith("text_encoder")]
        each = 2 if mixed_precision == "bf16" else 4
        away = sum(rows[role.title]["weights"] for role in roles_of(args, models)) if takes_turns(args) else 0
        phases["encoding of prompts"] = each * sum(count(network.parameters()) for network in encoders) - away
    return {phase: held + more for phase, more in phases.items()}


def peak(args, models, mixed_precision):
    """(phase that needs most, its bytes) of `peaks`."""
    phases = peaks(args, models, mixed_precision)
    phase = max(phases, key=phases.get)
    return phase, phases[phase]


def table(bytes_by_actor):
    """The plan as lines of text, in GiB."""
    columns = ("weights", "gradients", "optimizer", "ema")
    lines = [f"{'GiB':<20}" + "".join(f"{c:>11}" for c in (*columns, "sum"))]
    rows = {k: [v[c] for c in columns] for k, v in bytes_by_actor.items()}
    rows["sum"] = [sum(column) for column in zip(*rows.values())]
    for name, row in rows.items():
        lines.append(f"{name:<20}" + "".join(f"{x / GIB:>11.2f}" for x in (*row, sum(row))))
    return "\n".join(lines) + f"\n{ON_TOP}"
