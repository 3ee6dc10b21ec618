"""The models of a run, before weights load: reference, generator, VAE, LoRA, and what their configs say."""

from dataclasses import dataclass, replace

from diff_instruct.families import find_family
from diff_instruct.mistake import Mistake
from diff_instruct.models.adapter_start import targets_with
from diff_instruct.models.configs import (
    ModelSource,
    check_resolution,
    grid_of,
    read_index,
    read_networks,
    read_schedule,
    sizes_of,
)
from diff_instruct.models.lora import lora_targets
from diff_instruct.models.single_file import config_of, converted, is_single_file
from diff_instruct.models.starts import Lora, check_generator, check_lora, check_start, fixed_timesteps, words
from diff_instruct.models.weight_files import check_file
from pipeline_one_step import Family


@dataclass(frozen=True)
class Models:
    """What is known of the models before weights load.

    Args:
        reference ([`ModelSource`]), generator, vae (the same, or None): where they are from.
        family (a subclass of [`Family`]): of the reference.
        networks: name to network of the reference, on the meta device, without memory for its weights.
        timestep: t*, where the generator is evaluated; or a list, if it takes several steps.
        input_noise: "unit" or "scaled", what enters there.
        lora ([`Lora`]): fused into the reference, or None.
        has_null: whether the reference knows ∅, so whether it can be guided.
        embedded_guidance: of networks that have guidance as an input; None is the family's.
        lora_targets: the layers that get adapters, as peft's `target_modules`; None is the family's.
        sizes: (height, width) of each size that is trained, in pixels; empty: the reference's own.
        start ([`Lora`]): what the generator's adapters start as, or None; start_layers: the layers that it is for.
    """

    reference: ModelSource
    generator: ModelSource | None
    vae: ModelSource | None
    family: type[Family]
    networks: dict
    timestep: int | list[int]
    input_noise: str
    lora: Lora | None = None
    has_null: bool = True
    embedded_guidance: float | None = None
    lora_targets: tuple | str | None = None
    sizes: tuple = ()
    start: Lora | None = None
    start_layers: tuple = ()

    @property
    def denoiser(self):
        """Name of the network that denoises."""
        return self.family.denoiser

    def targets_of(self, role):
        """The layers that get adapters of a [`Role`]."""
        return targets_with(self.lora_targets, self.start_layers) if role.name == "generator" else self.lora_targets

    @property
    def image_sizes(self):
        """(height, width) of the pictures, in pixels, the first one first of all."""
        return self.sizes or ((self.grid.side, self.grid.side),)

    @property
    def grid(self):
        """The `Grid` of its latents."""
        return grid_of(self.family, self.networks)


def read_models(
    reference,
    generator=None,
    vae=None,
    timestep=None,
    generator_steps=None,
    resolution=None,
    input_noise=None,
    embedded_guidance=None,
    lora=None,
):
    """Read the configs of the reference and of the generator.

    Args:
        reference, generator, vae ([`ModelSource`]): the last two may be None: as the reference.
        timestep (`list[int]`), generator_steps, resolution, input_noise, embedded_guidance: as asked for, or None.
        lora ([`Lora`]): of the reference, or None.

    Raises:
        Mistake: for a pipeline that is not there, not supported or not complete, a schedule that is not its family's,
            a t* outside it, a resolution that the latents cannot make, a VAE or a generator that does not fit.
    """
    path = reference.path
    index = read_index(path, **reference.where)
    name = index["_class_name"]
    family = find_family(name[1] if isinstance(name, list) else name, path)  # [module, class]: it brings its own code
    first, last = read_schedule(reference, family)
    networks = read_networks(reference, family, index, vae)
    network = networks[family.denoiser]
    reason = family.unsupported(network.config)
    if reason is not None:
        raise Mistake(f"{path}: its {family.denoiser} {reason}")
    check_resolution(resolution, grid_of(family, networks), path)
    for key, value in family.assumed.items():
        if index.get(key, value) != value:
            raise Mistake(f"{path} has {key} {index[key]}; of a {family.name}, only {value} is supported")

    trained_at, own_noise, own_guidance = [family.timestep], None, None
    if generator is not None:
        asked = timestep, generator_steps, input_noise
        trained_at, own_noise, own_guidance = check_generator(generator, family, network, *asked)
    if None not in (own_noise, input_noise) and own_noise != input_noise:
        raise Mistake(f"{generator.path} was trained with --input_noise {own_noise}: give the same, or none")
    timesteps = fixed_timesteps(timestep or trained_at, generator_steps)
    if not (first <= timesteps[-1] and timesteps[0] <= last):
        raise Mistake(
            f"--timestep {words(timesteps)} is outside the schedule of {path}: t* must be in {first}..{last}"
        )
    if len(set(timesteps)) < len(timesteps):
        raise Mistake(f"--timestep {timesteps[0]} is too low for {len(timesteps)} steps: {words(timesteps)}")
    at = timesteps if len(timesteps) > 1 else timesteps[0]
    if embedded_guidance is not None and not network.config.get("guidance_embeds"):
        raise Mistake(f"--embedded_guidance: the {family.denoiser} of {path} does not take guidance as an input")
    if network.config.get("time_cond_proj_dim") is not None:
        raise Mistake(
            f"{path} is a latent consistency model, whose guidance is an input of its {family.denoiser} "
            "(time_cond_proj_dim): as a reference take the model that it was distilled from"
        )
    if lora is not None:
        check_lora(lora, family, network)
    guidance = own_guidance if embedded_guidance is None else embedded_guidance
    has_null = family.has_null and not index.get("is_distilled")  # FLUX.2 klein says so
    noise = own_noise or input_noise or "unit"
    return Models(reference, generator, vae, family, networks, at, noise, lora, has_null, guidance)


def models_of(args):
    """The [`Models`] that the training script's arguments ask for.

    Raises:
        Mistake: as `read_models`; and for guidance away from ∅ where the reference knows none.
    """
    cache_dir, path = args.cache_dir, args.pretrained_model_name_or_path
    if is_single_file(path):
        check_file(path)
        config = config_of(path, args.single_file_config)
        path = config if args.dry_run else converted(path, config, cache_dir)
    elif args.single_file_config is not None:
        raise Mistake(f"--single_file_config is for a reference in one file, but {path} is none")
    reference = ModelSource(path, args.revision, args.variant, cache_dir)
    others = args.pretrained_generator_name_or_path, args.pretrained_vae_model_name_or_path
    generator, vae = (path and ModelSource(path, variant=args.variant, cache_dir=cache_dir) for path in others)
    asked = args.timestep, args.generator_steps, args.resolution, args.input_noise, args.embedded_guidance
    lora = args.reference_lora and Lora.parse(args.reference_lora, cache_dir).here("--reference_lora")
    models = read_models(reference, generator, vae, *asked, lora)
    targets = lora_targets(args.lora_target_modules, models.family, models.networks[models.denoiser])
    models = replace(models, lora_targets=targets, sizes=tuple(sizes_of(args.resolution)))
    if args.pretrained_generator_lora is not None:
        start, network = Lora.parse(args.pretrained_generator_lora, cache_dir), models.networks[models.denoiser]
        start = start.here("--pretrained_generator_lora")
        if generator is not None:
            raise Mistake("give either --pretrained_generator_name_or_path or --pretrained_generator_lora")
        layers = check_start(start, models.family, network, args.lora_rank)
        models = replace(models, start=start, start_layers=layers)
    scales = {"cfg_scale": args.cfg_scale} | (
        {"pretrain_cfg_scale": args.pretrain_cfg_scale} if args.pretrain_steps else {}
    )
    scales |= {"pair_cfg_scale": args.pair_cfg_scale} if args.pair_steps or args.anchor_scale else {}
    for name, scale in scales.items():
        if scale != 1 and not models.has_null:
            raise Mistake(f"--{name} {scale:g}: {reference.path} knows no ∅ to be guided away from: give --{name} 1")
    return models
