"""What a run holds beside weights, before anything is loaded: Algorithm 1 on tensors that have no contents."""

import copy
import math
import weakref
from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding

from diff_instruct.models.configs import read_index
from diff_instruct.models.decoder import checkpoint_decoder
from diff_instruct.models.denoiser import Denoiser
from diff_instruct.models.lora import add_lora, checkpoint_network
from diff_instruct.models.published import rounding_of
from diff_instruct.models.roles import bases, on_base, roles_of
from diff_instruct.models.rounding import Rounded, round_empty
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.surrogate import Surrogate
from diff_instruct.terms import Alpha, Batch
from diff_instruct.training.steps import generated, generator_step, ta_loss
from pipeline_one_step import OneStepPipeline


class Live(TorchDispatchMode):
    """Within: counts the bytes of storages that operations make and that are still held; `peak` is the highest sum.

    Masks of prompts, which [`Tokens`] makes with contents, keep them: networks ask them for lengths.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.see(tensor, is_new=False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = (kwargs or {}).get("dtype") in (torch.int64, torch.bool)  # of nothing: it may be a mask
        hollow = any(isinstance(tensor, FakeTensor) for tensor in tensors) if tensors else not made
        if function is torch.ops.aten.index.Tensor and hollow:
            args = args[0], [places for index in args[1] for places in of_mask(index)]
        with nullcontext() if hollow else unset_fake_temporarily():
            result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.see(tensor, is_new=True)
        return result

    def see(self, tensor, is_new):
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if is_new else 0
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.free(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        del self.known[key]
        self.now -= size

    def highest(self, function):
        """The highest sum while the function runs, in bytes, above what is held before it."""
        before = self.peak = self.now
        function()
        return self.peak - before


def of_mask(index):
    """An index as integers, one tensor a dimension: a mask has as many places as its contents say."""
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    if not is_mask:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


class Tokens:
    """Any tokenizer, or the processor that holds it: as many tokens as there can be.

    Args:
        text_encoder: whose tokens they are; None: there is none.
    """

    def __init__(self, text_encoder=None):
        config = getattr(text_encoder, "config", None)
        self.model_max_length = min(getattr(config, "max_position_embeddings", None) or 77, 77)

    @property
    def tokenizer(self):
        return self

    def encode(self, text):
        return [1] * len(text.split())

    def apply_chat_template(self, messages, tokenize=True, **options):
        return self([messages], **options) if tokenize else "a"

    def __call__(self, prompt=None, max_length=None, text=None, **_):
        prompt = text if prompt is None else prompt
        with unset_fake_temporarily():
            tokens = torch.ones(len(prompt), max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": tokens, "attention_mask": tokens})


class Held(torch.autograd.Function):
    """A score whose graph holds so many bytes."""

    @staticmethod
    def forward(ctx, pixels, size):
        ctx.save_for_backward(torch.empty(size, dtype=torch.uint8))
        ctx.shape = pixels.shape
        return pixels.mean(dim=(1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(-1, 1, 1, 1).expand(ctx.shape).clone(), None


class Reward:
    """As much as the rewards of the arguments hold for a picture."""

    def __init__(self, args):
        trained, _ = read_rewards(args)
        self.size = sum(spec.published.graph_bytes for spec in trained if spec.published) // (
            2 if args.reward_dtype == "bf16" else 1
        )

    def __call__(self, pixels, prompts):
        return Held.apply(pixels, self.size * len(prompts))


def hollow(network, dtype, fake):
    """A copy without contents of a network on the meta device; adapters are float32, and all that is trained."""
    network = copy.deepcopy(network)
    with fake:
        for name, module in network.named_modules():
            adapter = ".lora_" in f".{name}"
            for key, p in module._parameters.items():
                if p is not None:
                    own = dtype if p.is_floating_point() else p.dtype  # of codes
                    empty = torch.empty(p.shape, dtype=torch.float32 if adapter else own)
                    module._parameters[key] = torch.nn.Parameter(empty, requires_grad=adapter)
            if isinstance(module, Rounded):
                for key, buffer in module._buffers.items():
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def hollow_scheduler(models):
    """The scheduler of [`OneStepPipeline`], from the reference's config."""
    source = models.reference
    _, name = read_index(source.path, **source.where)["scheduler"]
    cls = getattr(diffusers, name)
    config = cls.load_config(source.path, subfolder="scheduler", **source.where)
    return models.family.scheduler(cls.from_config(config))


def hollow_bases(models, roles, dtype, fake, base_quantization):
    """The network under each base, as `load_bases` makes them, without contents."""
    networks = {}
    for name in bases(roles):
        on_it, in_full = on_base(roles, name)
        network = copy.deepcopy(models.networks[models.denoiser])
        if not in_full:
            round_empty(network, rounding_of(models, base_quantization))
        for role in on_it:
            if role.rank:
                add_lora(network, role.name, role.rank, role.alpha, models.targets_of(role))
        networks[name] = hollow(network, torch.float32 if in_full else dtype, fake)
        if in_full:
            networks[name].requires_grad_(True)
    return networks


def hollow_actors(args, models, roles, dtype, autocast, fake):
    """(pipe, [`Denoiser`] of each role by name) as `load_actors` makes them, without contents."""
    networks = hollow_bases(models, roles, dtype, fake, args.base_quantization)
    network_of = {role.name: networks[role.base] for role in roles}
    others = {k: v for k, v in models.networks.items() if k != models.denoiser}
    parts = {k: hollow(copy.deepcopy(v).to(dtype) if k != "vae" else v, dtype, fake) for k, v in others.items()}
    for network in networks.values():
        if args.gradient_checkpointing:
            checkpoint_network(network, models.family)
        network.train()
    if args.gradient_checkpointing:
        checkpoint_decoder(parts["vae"])
    parts["vae"].eval()
    missing = dict.fromkeys(OneStepPipeline._optional_components)
    pipe = OneStepPipeline(
        **{**missing, **parts, models.denoiser: network_of["generator"]},
        scheduler=hollow_scheduler(models),
        timestep=models.timestep,
        family=models.family.name,
        input_noise=models.input_noise,
        embedded_guidance=models.embedded_guidance,
        sizes=[list(size) for size in models.sizes] or None,
    )
    for place in ("", "_2", "_3"):
        setattr(pipe, f"tokenizer{place}", Tokens(getattr(pipe, f"text_encoder{place}")))
    pipe.processor = pipe.tokenizer
    return pipe, {role.name: Denoiser(pipe, network_of[role.name], role.adapter, autocast) for role in roles}


def activations(args, models, mixed_precision):
    """The most that each phase of a run holds beside weights, optimizers and the average: phase to bytes.

    Gradients of what is trained are counted here, where they are: those of generator and TA are never held at once.

    Args:
        models ([`Models`]), mixed_precision: as in `plan`.
    """
    args = Namespace(**{**vars(args), "cfg_interval": (0.0, 1.0)})  # the most: guidance acts on every row
    half = mixed_precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if half else nullcontext
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    pipe, cast = hollow_actors(args, models, roles_of(args, models), dtype, autocast, fake)
    generator, ta, ref, phi = cast["generator"], cast["ta"], cast["ref"], cast.get("surrogate")
    reward = Reward(args)
    if phi is not None:
        compared = args.surrogate_group, args.min_timestep, args.max_timestep
        surrogate = Surrogate(generator, phi, ref, reward, pipe.decode, *compared, args.reward_batch_size)
    size, n, decoded = args.train_batch_size, len(pipe.timesteps) - 1, args.reward_batch_size or args.train_batch_size

    with fake, Live() as live:
        shape = pipe.latent_shape(*max(models.image_sizes, key=math.prod))

        def batch(b):
            with torch.no_grad():
                c = pipe.encode_prompt(["a"] * b)
            z, eps, noise = torch.randn(b, *shape), torch.randn(b, *shape), torch.randn(n, b, *shape)
            step, t = torch.full((b,), n), torch.full((b,), int(pipe.schedule.steps // 2))
            return Batch(["a"] * b, c, z, noise, step, t, eps, target=z)

        def ta_phase():
            ta_loss(one, generator, ta).backward()

        def surrogate_phase():
            surrogate.loss(surrogate.ask(one), args.reward_scale)[0].backward()

        def generator_phase(batch=None):
            x0 = generated(batch or one, generator)
            frozen = [p for p in ta.network.parameters() if p.requires_grad]
            for p in frozen:
                p.requires_grad_(False)
            gradient, _ = gradient_at_x0(x0, one, Alpha(args.cfg_scale, float(args.reward_scale != 0)))
            for p in frozen:
                p.requires_grad_(True)
            x0.backward(gradient)

        def both_phases():
            kept = one._replace(x0=generated(one, generator))
            ta_loss(kept, generator, ta).backward()
            without_gradients(ta.network)
            generator_phase(kept)

        @torch.no_grad()
        def validation():
            x0 = generator.generate(judged.z, judged.c, judged.noise)
            for part in x0.split(decoded):
                pipe.decode(part).clamp(0, 1)

        def without_gradients(network):
            for p in network.parameters():
                p.grad = None

        one, judged = batch(size), batch(args.num_eval_images)
        gradient_at_x0 = generator_step(args, ta, ref, one.c, reward, pipe.decode, phi)
        peaks = {"teaching assistant's step": live.highest(ta_phase)}
        without_gradients(ta.network)
        if phi is not None:
            peaks["surrogate's step"] = live.highest(surrogate_phase)
            without_gradients(phi.network)
        if args.reuse_generated:
            peaks["steps of both, on one x0"] = live.highest(both_phases)
        else:
            peaks["generator's step"] = live.highest(generator_phase)
        without_gradients(generator.network)
        peaks["validation"] = live.highest(validation)
    return peaks
