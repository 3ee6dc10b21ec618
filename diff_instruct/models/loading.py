"""Loads the reference and the generator (see `sources` for what is checked before)."""

import copy

import torch
from peft import PeftModel
from safetensors.torch import load_file

from diff_instruct.mistake import Mistake
from diff_instruct.models.lora import lora_layers, merged
from diff_instruct.models.published import Published, load_rounded, plan_of, published_generator, rounding_of, shards
from diff_instruct.models.weight_files import generator_weights, options
from pipeline_one_step import OneStepPipeline


def load_reference(models, dtype, base_quantization="none", device="cpu"):
    """The stock pipeline of the reference, frozen, its networks in `dtype`, with its LoRA fused. The network that
    denoises may be rounded as it loads; then it is on the device."""
    source, parts = models.reference, dict.fromkeys(models.family.unused)
    if rounding_of(models, base_quantization):
        parts[models.denoiser] = load_base(models, source, dtype, base_quantization, device)
    for name in set(models.family.optional) - models.networks.keys():  # the published pipeline lacks it
        parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    if models.vae is not None:
        cls = type(models.networks["vae"])
        parts["vae"] = cls.from_pretrained(models.vae.path, dtype=dtype, **options(models.vae, first="plain"))
    try:
        stock = models.family.stock().from_pretrained(source.path, dtype=dtype, **source.options, **parts)
    except OSError as error:  # of the Hub, which could not be asked before
        raise Mistake(f"{source.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if models.lora is not None:
        fuse_lora(models.lora, stock, models.denoiser)
    for name in models.networks:
        getattr(stock, name).requires_grad_(False).eval()
    return stock


def load_base(models, source, dtype, base_quantization, device):
    """The reference's network, or that of the generator's source, rounded tensor by tensor as it loads; what is
    published rounded is taken as it is."""
    network = models.networks[models.denoiser]
    if source is models.reference:
        published = Published(shards(source, models.denoiser))
    else:
        published = published_generator(source, models.denoiser)
    plan = plan_of(published, network) or rounding_of(models, base_quantization)
    return load_rounded(network, plan, published, dtype, device)


def fuse_lora(lora, stock, denoiser):
    """Add LoRA weights to the network of this name of a stock pipeline."""
    if lora.peft_config is None:
        stock.load_lora_weights(lora.path, cache_dir=lora.cache_dir)
        stock.fuse_lora(components=[denoiser], lora_scale=lora.scale)
        stock.unload_lora_weights()
        return
    adapted = PeftModel.from_pretrained(getattr(stock, denoiser), lora.path, cache_dir=lora.cache_dir)
    for layer in lora_layers(adapted):
        layer.scale_layer(lora.scale)
    setattr(stock, denoiser, adapted.merge_and_unload())


def is_copy(models):
    """Whether the generator starts as a copy of the reference in memory: with its LoRA fused it is in no file."""
    return models.generator is None and models.lora is not None


def load_network(models, reference, dtype, base_quantization="none", device="cpu"):
    """The network that the generator starts as: the reference's, or that of the generator's source, rounded if the
    reference is."""
    cls, source = type(reference), models.generator
    if rounding_of(models, base_quantization):
        return load_base(models, source or models.reference, dtype, base_quantization, device)
    if is_copy(models):
        return copy.deepcopy(reference).to(dtype)
    if source is None:
        where = {"subfolder": models.denoiser, **options(models.reference, models.denoiser)}
        return cls.from_pretrained(models.reference.path, dtype=dtype, **where)
    kind, weights = generator_weights(source, models.denoiser)
    if kind == "folder":
        return cls.from_pretrained(**weights, **options(source, weights.get("subfolder", ""), "plain"), dtype=dtype)
    if weights.endswith(".safetensors"):
        state = load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    network = cls.from_config(reference.config).to(dtype)
    network.load_state_dict(state)
    return network


def load_generator(models, stock):
    """The [`OneStepPipeline`] of the generator as it starts, in float32, all of it trainable; of weights that are
    published rounded it has what their codes stand for."""
    network = load_network(models, getattr(stock, models.denoiser), torch.float32)
    if getattr(network, "published", None) is not None:
        plain = type(network).from_config(network.config)
        plain.load_state_dict({name: make() for name, make in merged(network, None).items()})
        network = plain
    return one_step_pipeline(models, stock, network.requires_grad_(True))


def one_step_pipeline(models, stock, network):
    """The pipeline that is trained and shipped: the reference's parts around the generator's network, at t*."""
    parts = {name: getattr(stock, name, None) for name in OneStepPipeline._optional_components}
    parts[models.denoiser] = network
    return OneStepPipeline(
        **parts,
        vae=stock.vae,
        scheduler=models.family.scheduler(stock.scheduler),
        timestep=models.timestep,
        family=models.family.name,
        input_noise=models.input_noise,
        embedded_guidance=models.embedded_guidance,
        sizes=[list(size) for size in models.sizes] or None,
    )
