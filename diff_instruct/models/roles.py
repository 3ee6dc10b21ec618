"""Who plays in Algorithm 1, and on whose weights: one list, which is loaded, counted, and tried without contents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """A part that a network plays.

    Args:
        name: that of its adapters, too.
        title: in tables and in names of files.
        base: the name of the role whose weights it stands on; its own, or those of another, which are then frozen.
        rank: of its LoRA adapters; 0: it has none.
        alpha: their scale; None: the rank.
        trained: in full, as float32 weights of its own, or, with a rank, its adapters alone.
        averaged: whether an average of what is trained is kept.
    """

    name: str
    title: str
    base: str
    rank: int = 0
    alpha: float | None = None
    trained: bool = False
    averaged: bool = False

    @property
    def adapter(self):
        """The name of its adapters; None without."""
        return self.name if self.rank else None

    @property
    def in_full(self):
        """Whether all weights of its base are trained, and so float32."""
        return self.trained and not self.rank


def roles_of(args, models):
    """The [`Role`]s of a run; the last one is the reference.

    TA and surrogate start as the reference: copies, or, with `--ta_lora_rank` and `--surrogate_lora_rank`, adapters on
    the reference's own weights. With `--lora_rank` the generator stands on these, too, whatever it starts as, unless
    `--no-share_base` gives it a base of its own: then one frozen network plays all.
    """
    shared = args.lora_rank > 0 and (models.generator is None or args.share_base)
    generator = Role(
        "generator",
        "generator",
        base="ref" if shared else "generator",
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        trained=True,
        averaged=args.use_ema,
    )
    ta = Role(
        "ta",
        "teaching assistant",
        base="ref" if args.ta_lora_rank else "ta",
        rank=args.ta_lora_rank,
        alpha=args.ta_lora_alpha,
        trained=True,
    )
    surrogate = Role(
        "surrogate",
        "surrogate",
        base="ref" if args.surrogate_lora_rank else "surrogate",
        rank=args.surrogate_lora_rank,
        alpha=args.surrogate_lora_alpha,
        trained=True,
    )
    return generator, ta, *[surrogate] * has_surrogate(args), Role("ref", "reference", base="ref")


def has_surrogate(args):
    """Whether a surrogate learns what the reward's numbers say."""
    return args.reward_mode == "surrogate" and args.reward_scale != 0


def on_base(roles, base):
    """(the roles that stand on a base, whether it is trained in full)."""
    on_it = [role for role in roles if role.base == base]
    return on_it, any(role.in_full for role in on_it)


def bases(roles):
    """The names of the bases, each once."""
    return list(dict.fromkeys(role.base for role in roles))
