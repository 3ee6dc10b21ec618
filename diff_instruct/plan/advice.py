"""What makes a run fit: the flags that save memory, for `--dry_run --memory_gib` and for a run that is out of it."""

import copy
from typing import NamedTuple

from tqdm.auto import tqdm

from diff_instruct.models.roles import has_surrogate
from diff_instruct.models.sharding import processes
from diff_instruct.models.sources import models_of
from diff_instruct.plan.memory_plan import GIB, peak, plan
from diff_instruct.rewards.specs import NO_REWARD


class Lever(NamedTuple):
    """A flag that saves memory.

    Args:
        words: what is added to the command.
        sets: the arguments that it sets.
        unused: whether the run does without it so far, and could have it.
        in_activations: whether it makes activations smaller, not what is held all the time.
        needs: the arguments without which it is refused.
    """

    words: str
    sets: dict
    unused: bool
    in_activations: bool = False
    needs: tuple = ()
    replaces: tuple = ()  # words that come before it and say nothing more beside it

    def on(self, args):
        """The arguments with it."""
        changed = copy.copy(args)
        vars(changed).update(self.sets)
        return changed


def levers(args, models):
    """The [`Lever`]s that a run does without, those first that cost the result least."""
    half, twice = args.train_batch_size // 2, 2 * args.gradient_accumulation_steps
    several, shares = args.train_batch_size > 1, processes() > 1
    away = args.offload_text_encoder or args.prompt_cache
    judged = args.reward != [NO_REWARD]
    now, ranks = args.base_quantization, ("lora_rank", "ta_lora_rank", *["surrogate_lora_rank"] * has_surrogate(args))
    published = models.networks[models.denoiser].config.get("quantization_config")
    roundable = models.lora is None and not shares and not published
    every = (
        Lever("--gradient_checkpointing", {"gradient_checkpointing": True}, not args.gradient_checkpointing, True),
        Lever(
            "--reward_batch_size 1", {"reward_batch_size": 1}, several and judged and args.reward_batch_size != 1, True
        ),
        Lever(
            f"--train_batch_size {half} --gradient_accumulation_steps {twice}",
            {"train_batch_size": half, "gradient_accumulation_steps": twice},
            several and not (has_surrogate(args) and half % args.surrogate_group),
            True,
        ),
        Lever("--reward_dtype bf16", {"reward_dtype": "bf16"}, judged and args.reward_dtype == "fp32", True),
        Lever("--mixed_precision bf16", {"mixed_precision": "bf16"}, args.mixed_precision != "bf16"),
        Lever("--offload_text_encoder", {"offload_text_encoder": True}, not away),
        Lever(
            "--prompt_cache prompts",
            {"prompt_cache": "prompts"},
            not args.prompt_cache and not shares,
            replaces=("--offload_text_encoder",),
        ),
        Lever("--offload_ema", {"offload_ema": True}, args.use_ema and not args.offload_ema and not shares),
        Lever("--use_8bit_adam", {"use_8bit_adam": True}, not args.use_8bit_adam and not shares),
        Lever("--no-use_ema", {"use_ema": False}, args.use_ema and shares),
        Lever("--ta_lora_rank 64", {"ta_lora_rank": 64}, not args.ta_lora_rank),
        Lever(
            "--surrogate_lora_rank 64",
            {"surrogate_lora_rank": 64},
            has_surrogate(args) and not args.surrogate_lora_rank,
        ),
        Lever("--lora_rank 64", {"lora_rank": 64}, not args.lora_rank),
        Lever(
            "--share_base",
            {"share_base": True},
            bool(args.lora_rank and models.generator is not None and not args.share_base),
        ),
        Lever("--base_quantization int8", {"base_quantization": "int8"}, now == "none" and roundable, needs=ranks),
        Lever(
            "--base_quantization nf4",
            {"base_quantization": "nf4"},
            now != "nf4" and roundable,
            needs=ranks,
            replaces=("--base_quantization int8",),
        ),
    )
    return [lever for lever in every if lever.unused]


def highest(args, models):
    """`peak` of the arguments."""
    return peak(args, models, args.mixed_precision or "no")


def advice(args, models, memory_gib):
    """One line that says whether a run fits into so many GiB: the largest batch, or the flags that make it fit."""
    phase, need = highest(args, models)
    line = f"Predicted peak, in the {phase}: {need / GIB:.2f} GiB. "
    if need <= memory_gib * GIB:
        larger = copy.copy(args)
        larger.train_batch_size = 2 * args.train_batch_size
        each = max(1, highest(larger, models)[1] - need) / args.train_batch_size
        batch = args.train_batch_size + int((memory_gib * GIB - need) / each)
        return f"{line}It fits into {memory_gib:g} GiB, and so does a batch of about {batch}."
    words = []
    bar = tqdm(levers(args, models), desc="flags tried, until it fits", leave=False)  # each is a prediction of its own
    for lever in bar:
        bar.set_postfix_str(lever.words)
        args = lever.on(args)
        words = [*(earlier for earlier in words if earlier not in lever.replaces), lever.words]
        need = highest(args, models)[1]
        if need <= memory_gib * GIB:
            return f"{line}It fits into {memory_gib:g} GiB with {' '.join(words)}: {need / GIB:.2f} GiB."
    return f"{line}It does not fit into {memory_gib:g} GiB: {need / GIB:.2f} GiB even with {' '.join(words)}."


def what_would_help(args):
    """One line for a run that is out of memory: the largest actor of the plan, and the three levers that would help
    most: two that the plan says save most, then the first of those that make activations smaller."""
    models = models_of(args)

    def held(args):
        return {k: sum(row.values()) for k, row in plan(args, models, args.mixed_precision or "no").items()}

    actors = held(args)
    unused = [lever for lever in levers(args, models) if all(getattr(args, name) for name in lever.needs)]
    total = sum(actors.values())
    replaced = {words for lever in unused for words in lever.replaces}
    steady = [lever for lever in unused if not lever.in_activations and lever.words not in replaced]
    saved = {lever.words: total - sum(held(lever.on(args)).values()) for lever in steady}
    best = [words for words in sorted(saved, key=saved.get, reverse=True) if saved[words] > 0][:2]
    best += [lever.words for lever in unused if lever.in_activations][: 3 - len(best)]
    largest = max(actors, key=actors.get)
    return (
        f"the largest actor is the {largest} ({actors[largest] / GIB:.2f} of {total / GIB:.2f} GiB, "
        f"without activations); what would help most: {', '.join(best)}"
    )
