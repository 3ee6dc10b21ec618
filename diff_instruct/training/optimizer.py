"""What is trained of a network, and all that its training needs."""

from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diff_instruct.mistake import Mistake
from diff_instruct.models.lora import trained_parameters
from diff_instruct.models.sharding import is_share, share_as, whole


BUCKET = 2**26  # elements that processes exchange at a time


def make_optimizer(args, parameters, learning_rate):
    """AdamW as the arguments say."""
    parameters, options = list(parameters), {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        AdamW, options["fused"] = torch.optim.AdamW, parameters[0].device.type in ("cpu", "cuda")
    return AdamW(parameters, lr=learning_rate, weight_decay=args.adam_weight_decay, **options)


def buckets(tensors):
    """Lists of tensors of one dtype, in order, with `BUCKET` elements at most (or one tensor)."""
    part, size = [], 0
    for tensor in tensors:
        if part and (size + tensor.numel() > BUCKET or tensor.dtype != part[0].dtype):
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part


class Trained:
    """The trained parameters of a network in a role, their optimizer, learning rate and, if kept, average.

    Processes average their gradients here, at the end of a phase of Algorithm 1, instead of in a wrapper of the
    network: a network may then play several roles, and the passes before the last need no special case. With FSDP2
    each backward pass has done so already, and parameters, gradients, optimizer and average are this process's shares.
    A gradient that is not finite is counted and not applied (all processes see the same one).

    Args:
        name (`str`): "generator" or "teaching assistant".
        denoiser ([`Denoiser`]): the network in its role.
        learning_rate: at its peak.
        steps (`int`): optimizer steps in all.
        warmup_steps (`int`): among them, those in which the learning rate rises.
        average (`bool`): keep an [`EMAModel`].

    Attributes:
        parameters (`dict`): by name, the list made once.
        norm (`float`): of the last gradient, before clipping.
        skipped, in_a_row (`int`): steps that were not taken, in all and since the last one that was.
    """

    def __init__(self, accelerator, args, name, denoiser, learning_rate, steps, warmup_steps, average=False):
        self.accelerator, self.name, self.max_grad_norm = accelerator, name, args.max_grad_norm
        self.parameters = trained_parameters(denoiser.network, denoiser.adapter)
        self.args, self.average, self.offload_ema = args, average, args.offload_ema
        self.train(True)
        self.base = getattr(denoiser.network, "digest", None)  # of a rounded base, which no checkpoint holds
        self.begin(learning_rate, steps, warmup_steps)
        self.norm, self.skipped, self.in_a_row = 0.0, 0, 0

    def begin(self, learning_rate, steps, warmup_steps):
        """A new optimizer, learning rate and average from here; the arguments are those of the class."""
        # Not prepared by accelerate, which with FSDP2 takes an optimizer only beside a model, and one of them.
        self.optimizer = make_optimizer(self.args, self.parameters.values(), learning_rate)
        counts = {"num_warmup_steps": warmup_steps, "num_training_steps": steps}
        self.schedule = get_scheduler(self.args.lr_scheduler, self.optimizer, **counts)
        # From the first step on: left alone, it copies the parameters then, whatever the decay.
        self.ema = EMAModel(self.parameters.values(), update_after_step=-1) if self.average else None
        if self.average and self.offload_ema:
            self.ema.to("cpu")

    @torch.no_grad()
    def begin_from_average(self, **stage):
        """Another stage, which starts from the average, as from an export: see `begin`."""
        if self.ema is not None:
            for p, average in zip(self.parameters.values(), self.ema.shadow_params):
                p.copy_(average)
        self.begin(**stage)

    @property
    def learning_rate(self):
        """That of the next step."""
        return self.schedule.get_last_lr()[0]

    def train(self, mode):
        """Whether gradients reach the parameters."""
        for p in self.parameters.values():
            p.requires_grad_(mode)

    @contextmanager
    def frozen(self):
        """Within: nothing is trained; a graph through the network holds only what its input's gradient needs.

        The gathered weights of a sharded network do not see this: the graph holds more, though whoever asks for the
        gradient of x0 alone has none of theirs computed.
        """
        self.train(False)
        try:
            yield
        finally:
            self.train(True)

    def average_gradients(self):
        """Every process gets the mean of the gradients of all."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None and not is_share(p.grad)]
        for part in buckets(gradients):
            flat = torch.cat([g.flatten() for g in part])
            mean = self.accelerator.reduce(flat, "mean").split([g.numel() for g in part])
            for gradient, values in zip(part, mean):
                gradient.copy_(values.view_as(gradient))

    def step(self):
        """End a phase: average the gradients, clip, step, and leave no gradient behind.

        Returns:
            `bool`: whether the step was taken: not if the gradient is not finite.
        """
        if self.accelerator.num_processes > 1:
            self.average_gradients()
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        self.norm = norm.item()
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        return finite

    def update_average(self, decay):
        """Move the average, if there is one, towards the parameters: decay in [0, 1), the part that stays."""
        if self.ema is None:
            return
        self.ema.decay = self.ema.min_decay = decay
        if self.offload_ema:  # there is room now: no activations, no gradients
            self.ema.to(self.accelerator.device)
        self.ema.step(self.parameters.values())
        if self.offload_ema:
            self.ema.to("cpu")

    @contextmanager
    def averaged(self):
        """Within: the parameters are their averages, if there is one. They change places, one tensor at a time."""

        @torch.no_grad()
        def swap():  # values, not storages: a sharded network gathers from those that it knows
            for p, average in zip(self.parameters.values(), self.ema.shadow_params):
                value = p.clone()
                p.copy_(average)
                average.copy_(value)

        if self.ema is None:
            yield
            return
        swap()
        try:
            yield
        finally:
            swap()

    def state_dict(self):
        """Tensors by name: the parameters, and their averages under `average.`."""
        state = {k: p.detach() for k, p in self.parameters.items()}
        if self.ema is not None:
            state |= {f"average.{k}": average for k, average in zip(self.parameters, self.ema.shadow_params)}
        return state

    def load_state_dict(self, state):
        """Continue with these tensors.

        Raises:
            ValueError: if they are not those of the same parameters.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[k].shape != own[k].shape for k in own):
            wrong = sorted(state.keys() ^ own.keys()) or [k for k in own if state[k].shape != own[k].shape]
            raise ValueError(
                f"{len(wrong)} tensors of the {self.name} are missing, too many or of another shape: {wrong[0]}"
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(share_as(state[key], value))

    def optimizer_state(self):
        """Tensors by name, `<what>.<parameter>`; empty before the first step."""
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        return {f"{what}.{name}": torch.as_tensor(v) for name, state in states.items() for what, v in state.items()}

    def load_optimizer_state(self, state):
        """Continue with these tensors."""
        place, found = {name: i for i, name in enumerate(self.parameters)}, {}
        for key, value in state.items():
            what, _, name = key.partition(".")
            if value.dtype == torch.int64:  # bitsandbytes counts steps in plain numbers
                value = value.item()
            else:
                like = self.parameters[name]
                value = (share_as(value, like) if value.shape == like.shape else value).clone()  # not in the file
            found.setdefault(place[name], {})[what] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": found})

    def counters(self):
        """Plain numbers of its state, for the checkpoint."""
        steps = self.ema.optimization_step if self.ema is not None else 0
        counters = {"skipped": self.skipped, "in_a_row": self.in_a_row, "average_steps": steps}
        if self.base is not None:
            counters["base"] = self.base
        return {**counters, "schedule": self.schedule.state_dict()}

    def load_counters(self, state):
        """Continue with these.

        Raises:
            Mistake: if the base that the adapters stand on was rounded to something else.
        """
        if self.base is not None and state["base"]["sha256"] != self.base["sha256"]:
            then, now = ({k: v for k, v in base.items() if k != "sha256"} for base in (state["base"], self.base))
            raise Mistake(
                "--resume_from_checkpoint: the base is rounded from its source anew, but comes out otherwise than in "
                f"the run so far (then {then}, now {now}): take the same files and the same versions"
            )
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if self.ema is not None:
            self.ema.optimization_step = state["average_steps"]
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr()):
            group["lr"] = rate


def stage(args, on_pairs=False):
    """Learning rate and steps of θ, as [`Trained`] takes them: while it learns pairs, or after."""
    rate, steps = args.learning_rate, args.pretrain_steps + args.max_train_steps
    if on_pairs:
        rate, steps = args.pair_learning_rate or rate, args.pair_steps
    return {"learning_rate": rate, "steps": steps, "warmup_steps": args.lr_warmup_steps}


def make_trained(args, accelerator, roles, actors, on_pairs):
    """θ, ψ and φ, each a [`Trained`]; ψ takes `--ta_steps` steps for one of θ, and a warm-up before; φ takes one while
    there is a reward, and is None where there is no surrogate."""
    title = {role.name: role.title for role in roles}
    total, k = args.pretrain_steps + args.max_train_steps, args.ta_steps
    theta = Trained(
        accelerator,
        args,
        title["generator"],
        actors.generator,
        average=args.use_ema,
        **stage(args, on_pairs),
    )
    psi = Trained(
        accelerator,
        args,
        title["ta"],
        actors.ta,
        learning_rate=args.ta_learning_rate or args.learning_rate,
        steps=args.ta_warmup_steps + k * total,
        warmup_steps=k * args.lr_warmup_steps,
    )
    if actors.surrogate is None:
        return theta, psi, None
    phi = Trained(
        accelerator,
        args,
        title["surrogate"],
        actors.surrogate,
        learning_rate=args.surrogate_learning_rate or args.ta_learning_rate or args.learning_rate,
        steps=args.max_train_steps,
        warmup_steps=args.lr_warmup_steps,
    )
    return theta, psi, phi
