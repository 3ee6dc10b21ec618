"""What other programs need to draw an export's pictures: their noise levels, a ComfyUI workflow, command lines.

ComfyUI and stable-diffusion.cpp count noise as k-diffusion does, σ_k = σ_t / α_t, and start a partial schedule from
σ_k z. They divide by √(1 + σ_k²) before the network, which so is given σ_t z. A generator that was trained on z itself
(`input_noise` "unit") needs its noise times 1 / σ_t there, else it draws weak pictures.
"""

import math
import shlex
from dataclasses import dataclass, field

import torch

from diff_instruct.families import FAMILIES
from diff_instruct.mistake import Mistake


@dataclass(frozen=True)
class App:
    """What is known of a family outside diffusers: its `apps`.

    Args:
        betas: (schedule, first, last) that the programs take the family to have, whatever the export says; None for
            flow matching.
        single_file: whether diffusers reads a file of the family in the original layout.
        original: the layers' names in the original layout, see `original.py`; None where ComfyUI reads diffusers'.
        original_lora: whether ComfyUI reads a LoRA by these names alone, not by diffusers'.
        zeros: {name: shape} of weights of diffusers that ComfyUI looks for, zero where the network has none.
        architecture: what a GGUF file calls the family; None if no program reads one.
        encoder: ComfyUI's node that loads the text encoders, its `type`, and the files; one that begins with `{name}`
            is written from the export.
        prompt: what ComfyUI's text encoder is given for a prompt, where it is not the prompt alone.
        latent: ComfyUI's node that makes empty latents.
        vae: the published VAE's file; None if the export's own is written.
        half_overflows: whether the published VAE overflows in float16.
        task: of `optimum-cli export openvino`, or None.
        stable_diffusion_cpp: its arguments for text encoders and VAE; None if it does not draw the family.
    """

    betas: tuple | None = None
    single_file: bool = False
    original: str | None = None
    original_lora: bool = False
    zeros: dict = field(default_factory=dict)
    architecture: str | None = None
    encoder: tuple | None = None
    prompt: str = "{}"
    latent: str = "EmptyLatentImage"
    vae: str | None = None
    half_overflows: bool = False
    task: str | None = None
    stable_diffusion_cpp: str | None = None


# What core ComfyUI calls prediction types in its node ModelSamplingDiscrete; without the node it takes epsilon.
SAMPLING = {"v_prediction": "v_prediction", "sample": "x0"}


@dataclass(frozen=True)
class NoiseLevels:
    """How an export's steps are said elsewhere.

    Args:
        sigmas: σ of each step in the program's count, and 0.
        factor: what the program's own noise is multiplied with.
        flow: whether x_t = (1 − σ) x0 + σ ε.
    """

    sigmas: tuple
    factor: float
    flow: bool

    @property
    def first(self):
        """What unit noise is multiplied with altogether."""
        return self.sigmas[0] * self.factor

    def text(self, digits=9):
        """As ComfyUI's node `ManualSigmas` and stable-diffusion.cpp's `--sigmas` take them."""
        return ", ".join(number(sigma, digits) for sigma in self.sigmas)


def number(value, digits=9):
    """A decimal without exponent, which the programs do not read, and without trailing zeros."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def noise_levels(pipe):
    """[`NoiseLevels`] of a [`OneStepPipeline`]."""
    schedule, flow = pipe.schedule, pipe.schedule.prediction_type == "flow"
    alphas, sigmas = ([table[t].item() for t in pipe.timesteps] for table in (schedule.alphas, schedule.sigmas))
    factor = 1 / sigmas[0] if pipe.config.input_noise == "unit" else 1.0
    return NoiseLevels((*(s if flow else s / a if a else math.inf for a, s in zip(alphas, sigmas)), 0.0), factor, flow)


def find_app(pipe):
    """The [`App`] of a pipeline's family.

    Raises:
        Mistake: if other programs do not know the family, or not with this noise schedule.
    """
    family, config = pipe.config.family, pipe.scheduler.config
    if pipe.family.apps is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.apps)
        raise Mistake(f"a {family} has no layout for other programs; those of {known} have one")
    app = App(**pipe.family.apps)
    if app.betas is not None:
        own = (config.beta_schedule, config.beta_start, config.beta_end)
        if own != app.betas or config.get("rescale_betas_zero_snr") or config.get("trained_betas") is not None:
            raise Mistake(
                f"other programs take a {family} to have betas {app.betas}, but these are {own}: it runs in diffusers "
                "only"
            )
    return app


def own_layout(network, app):
    """The weights of a network that ComfyUI reads by diffusers' names."""
    return {key: torch.zeros(shape) for key, shape in app.zeros.items()} | network.state_dict()


def workflow(pipe, name, prompt, seed=0):
    """ComfyUI's graph that draws the export, by core nodes, in the form that its server and its page both load.

    Every decimal that matters is in a string (`ManualSigmas`): number fields are rounded to two decimals there. Noise
    of the right size comes from `AddNoise`, which multiplies with the first σ it is given; so the sampler adds none.
    In flow matching the sampler adds it, for there it shrinks what it is given by 1 − σ.

    Args:
        name: what the export's files are called, such as apples_1step.

    Raises:
        Mistake: for a flow-matching export that starts below σ = 1 from unit noise, which core nodes cannot say.
    """
    levels, (_, height, width) = noise_levels(pipe), pipe.latent_shape()
    height, width = height * pipe.grid.factor, width * pipe.grid.factor
    if levels.flow and abs(levels.factor - 1) > 1e-6:
        raise Mistake("ComfyUI's core nodes cannot start flow matching from unit noise below t = 1000")
    nodes = {}

    def node(class_type, **inputs):
        nodes[str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return str(len(nodes))

    app = find_app(pipe)
    if app.single_file:
        checkpoint = node("CheckpointLoaderSimple", ckpt_name=f"{name}.safetensors")
        model, clip, vae = [checkpoint, 0], [checkpoint, 1], [checkpoint, 2]
    else:
        loader, kind, *files = app.encoder
        files = [file.format(name=name) for file in files]
        names = ["clip_name"] if len(files) == 1 else [f"clip_name{i}" for i in range(1, len(files) + 1)]
        model = [node("UNETLoader", unet_name=f"{name}_transformer.safetensors", weight_dtype="default"), 0]
        clip = [node(loader, **dict(zip(names, files)), **({"type": kind} if kind else {})), 0]
        vae = [node("VAELoader", vae_name=app.vae or f"{name}_vae.safetensors"), 0]
    if pipe.schedule.prediction_type in SAMPLING:
        sampling = SAMPLING[pipe.schedule.prediction_type]
        model = [node("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False), 0]
    encoder = pipe.family.text_node(pipe)
    size = {"width": width, "height": height} if encoder != "CLIPTextEncode" else {}
    text = [node(encoder, text=app.prompt.format(prompt), **size, clip=clip), 0]
    if pipe.config.embedded_guidance is not None:
        text = [node("FluxGuidance", conditioning=text, guidance=pipe.config.embedded_guidance), 0]
    latent = [node(app.latent, width=width, height=height, batch_size=1), 0]
    if not levels.flow:
        noise = node("RandomNoise", noise_seed=seed)
        size = node("ManualSigmas", sigmas=f"{number(levels.first)}, 0")
        latent = [node("AddNoise", model=model, noise=[noise, 0], sigmas=[size, 0], latent_image=latent), 0]
    sampled = node(
        "SamplerCustom",
        model=model,
        add_noise=levels.flow,
        noise_seed=seed,
        cfg=1.0,
        positive=text,
        negative=text,  # not asked for at 1
        sampler=[node("KSamplerSelect", sampler_name="lcm"), 0],
        sigmas=[node("ManualSigmas", sigmas=levels.text()), 0],
        latent_image=latent,
    )
    image = node("VAEDecode", samples=[sampled, 0], vae=vae)
    node("SaveImage", images=[image, 0], filename_prefix=name)
    return nodes


def stable_diffusion_cpp(pipe, name, prompt):
    """stable-diffusion.cpp's command line.

    Raises:
        Mistake: if it does not draw the family, or not from unit noise, which it has no argument for.
    """
    levels, (_, height, width), app = noise_levels(pipe), pipe.latent_shape(), find_app(pipe)
    if app.stable_diffusion_cpp is None:
        raise Mistake(f"stable-diffusion.cpp does not draw a {pipe.config.family}")
    if abs(levels.factor - 1) > 0.005:
        raise Mistake(
            f"stable-diffusion.cpp starts from σ z and has no factor on the noise, which must be {levels.factor:.3f} "
            "here: only an export with --input_noise scaled, or with t* = 999, runs there"
        )
    prediction = " --prediction v" if pipe.schedule.prediction_type == "v_prediction" else ""
    name = shlex.quote(name)
    model = f"-m {name}.safetensors"
    if not app.single_file:
        model = f"--diffusion-model {name}_transformer.safetensors {app.stable_diffusion_cpp.format(name=name)}"
    if pipe.config.embedded_guidance is not None:
        prediction += f" --guidance {pipe.config.embedded_guidance}"
    return (
        f"sd-cli {model} -p {shlex.quote(prompt)} --sampling-method lcm --steps {len(pipe.timesteps)} "
        f'--sigmas "{levels.text()}" --cfg-scale 1 -W {width * pipe.grid.factor} -H {height * pipe.grid.factor} '
        f"--rng cpu{prediction}"
    )


def openvino(pipe, name):
    """The line that converts the stock layout for OpenVINO.

    Raises:
        Mistake: if optimum has no task for the family.
    """
    task = find_app(pipe).task
    if task is None:
        raise Mistake(f"optimum-cli exports no {pipe.config.family} to OpenVINO")
    name = shlex.quote(name)
    return f"optimum-cli export openvino --model {name}_diffusers --task {task} --weight-format fp16 {name}_openvino"


def where_it_runs(pipe, name, prompt):
    """Markdown: for each program the numbers that draw the export's pictures, or why it cannot draw them."""

    def attempt(line, *args):
        try:
            return f"`{line(*args)}`"
        except Mistake as error:
            return str(error)

    levels, sigma = noise_levels(pipe), pipe.schedule.sigmas[pipe.timesteps[0]].item()
    times, scaled = ", ".join(map(str, pipe.timesteps)), pipe.config.input_noise == "scaled" and sigma < 1
    diffusers = "1" if not scaled else f"{sigma:.3f}: give `latents` = {sigma:.4f} z"
    rows = ["| program | noise levels | factor on its noise | how |", "|---|---|---|---|"]
    rows.append(f"| diffusers, this pipeline | t = {times} | 1 | `DiffusionPipeline.from_pretrained` |")
    stock = "as the call above has it" if levels.flow else "`LCMScheduler`"
    steps = pipe.family.stock_arguments(pipe)
    given = [name for name in ("timesteps", "sigmas") if name in steps] or ["num_inference_steps"]
    steps = ", ".join(f"`{name}={steps[name]}`" for name in given)
    rows.append(f"| diffusers, stock pipeline, {stock} | {steps} | {diffusers} | no guidance |")
    try:
        app = find_app(pipe)
    except Mistake as error:
        return "\n".join(rows) + f"\n\nElsewhere: {error}."
    k, graph = f'"{levels.text(4)}"', f"`{name}_workflow.json`"
    rows.append(f"| ComfyUI, sampler `lcm`, cfg 1 | `ManualSigmas` {k} | {levels.factor:.3f} | {graph} |")
    if app.stable_diffusion_cpp is not None:
        how = attempt(stable_diffusion_cpp, pipe, name, prompt)
        rows.append(f"| stable-diffusion.cpp | `--sigmas` {k} | {levels.factor:.3f}; it has 1 | {how} |")
    if app.task:
        rows.append(f"| OpenVINO | as the stock pipeline | {diffusers} | `{openvino(pipe, name)}` |")
    return "\n".join(rows)
