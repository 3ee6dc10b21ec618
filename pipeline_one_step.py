# SPDX-License-Identifier: Apache-2.0
"""One-step text-to-image pipeline: one evaluation of a diffusion network at one fixed timestep t*.

A generator that was trained for it takes a few such steps, one evaluation at each of several fixed timesteps.

This file travels with the weights, so it needs nothing but torch, diffusers and transformers. It holds what all
families of models share: the schedule, the pipeline, and what a family must say. In an export the class of its one
family follows; in the project each has a file of its own in `diff_instruct/families`.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("user/model", trust_remote_code=True)
    image = pipe("a red apple").images[0]
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


if __name__.startswith("diffusers_modules."):
    sys.modules.pop(__name__, None)  # or diffusers would run the file of the next export inside this module


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: with accelerate's offloading its weights may be elsewhere, or nowhere yet."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None) or module.device


def compute_dtype(network: torch.nn.Module) -> torch.dtype:
    """The dtype that a network computes in: of its first weight that is neither an adapter's, nor rounded to a
    quantised type, nor kept in float32."""
    left_out = (*(getattr(network, "_keep_in_fp32_modules", None) or ()), "lora_")
    weights = (p for k, p in network.named_parameters() if not any(word in k for word in left_out))
    return next(p.dtype for p in weights if p.is_floating_point())


class Schedule:
    """The forward process x_t = α_t x0 + σ_t ε of a scheduler, and the conversions of what networks predict.

    Variance-preserving (schedulers with betas): α_t² = ᾱ_t, σ_t² = 1 − ᾱ_t, t in 0 .. T − 1; networks predict ε
    (`epsilon`), x0 (`sample`) or α ε − σ x0 (`v_prediction`).
    Flow matching ([`FlowMatchEulerDiscreteScheduler`]): α_t = 1 − t/T, σ_t = t/T, t in 1 .. T; networks predict
    ε − x0 (`flow`).

    Attributes:
        first, last (`int`): the timesteps that a generator may be evaluated at.

    Raises:
        ValueError: for another prediction type.
    """

    def __init__(self, scheduler: SchedulerMixin, device: str | torch.device = "cpu"):
        self.steps = scheduler.config.num_train_timesteps
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            self.sigmas = torch.arange(self.steps + 1, dtype=torch.float32) / self.steps
            self.alphas, self.prediction_type = 1 - self.sigmas, "flow"
            self.first, self.last = 1, self.steps
        else:
            alphas_cumprod = scheduler.alphas_cumprod.float()
            self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
            self.prediction_type = scheduler.config.prediction_type
            self.first, self.last = 0, self.steps - 1
        self.noisiest = int(self.alphas.nonzero()[-1])  # the last timestep at which x_t still holds something of x0
        if self.prediction_type == "epsilon":  # the noise in pure noise says nothing of x0
            self.last = self.noisiest
        if self.prediction_type not in ("epsilon", "sample", "v_prediction", "flow"):
            raise ValueError(f"prediction_type `{self.prediction_type}` is not one of epsilon, sample, v_prediction")
        self.alphas, self.sigmas = self.alphas.to(device), self.sigmas.to(device)

    def __call__(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α_t and σ_t, each (B, 1, 1, 1), of integer timesteps t (B,)."""
        if self.alphas.device != t.device:
            self.alphas, self.sigmas = self.alphas.to(t.device), self.sigmas.to(t.device)
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def timesteps(self, u: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """π(t): t uniform on the integers of [low·T, high·T], both ends included, from u ~ U[0, 1), (B,).

        The ends where α or σ is 0 are left out: scores and weightings are infinite there.
        """
        first, last = max(round(low * self.steps), self.first), min(round(high * self.steps), self.noisiest)
        return first + (u * (last - first + 1)).long().to(self.alphas.device)

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x0 + σ_t ε, all (B, C, H, W)."""
        alpha, sigma = self(t)
        return alpha * x0 + sigma * eps

    def x0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output to its estimate x̂0 of the clean latents, (B, C, H, W), float32."""
        (alpha, sigma), output, x_t = self(t), output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * output
        return x_t - sigma * output

    def epsilon(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output to its estimate ε̂ of the noise, (B, C, H, W), float32."""
        (alpha, sigma), output, x_t = self(t), output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "flow":
            return x_t + alpha * output
        return (x_t - alpha * self.x0(output, x_t, t)) / sigma

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """λ(t), (B, 1, 1, 1), of ‖ε̂ − ε‖² in the loss of a network of this kind: 1; for flow matching and v-prediction
        1/α_t², which makes it the plain loss ‖v̂ − v‖² (an unweighted one leaves the high noise levels, where x0 is
        made, unlearnt)."""
        alpha, _ = self(t)
        return 1 / alpha**2 if self.prediction_type in ("flow", "v_prediction") else torch.ones_like(alpha)


@functools.cache
def with_lora_loaders(cls, family):
    """`cls` with the LoRA loaders of a family's stock pipeline, if that has any."""
    loaders = [base for base in family.stock().__bases__ if issubclass(base, LoraBaseMixin)]
    if not loaders or issubclass(cls, loaders[0]):
        return cls
    return type(cls.__name__, (loaders[0], cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


class OneStepPipeline(DiffusionPipeline):
    r"""
    A one-step generator g_θ(z, c) = x̂0 of the network's output at (z, t*), with z ~ N(0, I) fed as x_{t*}.

    With several timesteps t_1 > ... > t_n it takes n steps, as consistency models and DMD2 do: x0 at t_1 as above;
    then x_{t_2} = α x0 + σ ε with fresh noise ε, and x̂0 of the output at (x_{t_2}, t_2) is the new x0; and so on.

    The same weights also run in the stock pipeline of the family with these timesteps (see the model card), and
    `load_lora_weights`, `set_adapters`, `fuse_lora` and the others are the stock's: a LoRA of the base goes on top.

    Every component must be given; those that the family does not have are None. So are text encoders if embeddings
    will be given instead of prompts, and network and VAE if prompts are to be encoded and nothing else.

    Args:
        tokenizer, text_encoder: turn the prompt into the conditioning c: T5 for PixArt-α, CLIP for Stable Diffusion.
        tokenizer_2, text_encoder_2: the second ones of SDXL, SD3 and FLUX.1; tokenizer_3, text_encoder_3: SD3's T5.
        processor: has the tokenizer, where the text encoder is one of pictures, too (Qwen-Image 2.1).
        vae: decodes latents to pixels.
        transformer, unet: the generator, one of the two, whichever the family has.
        scheduler: holds the noise schedule and the prediction type; it is not stepped here.
        timestep (`int` or `list[int]`): t*, the timestep at which the generator was trained; or n descending ones.
        family (`str`): class name of the stock pipeline, the `name` of a [`Family`] that is defined.
        input_noise (`str`, defaults to "unit"): what enters at t*: z ("unit"), or σ_t z ("scaled"), as ComfyUI and
            SIM's checkpoints have it. The same thing at σ = 1.
        max_sequence_length (`int`, defaults to the family's): prompts are cut to this number of tokens.
        embedded_guidance (`float`, defaults to the family's): what networks with guidance as an input are given.
        sizes (`list` of [height, width], *optional*): in pixels, at which the generator was trained; the first is what
            it draws if nobody says; by default the network's own.

    Raises:
        ValueError: if t* is missing or lies outside the schedule, several do not descend, two networks are given, or a
            config value is unknown.
    """

    code = Path(__file__).read_text()  # kept, since another version of this file may take its place
    _optional_components = [
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
        "processor",
        "transformer",
        "unet",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __new__(cls, *args, family=None, **kwargs):
        """A pipeline of `cls` with the LoRA loaders of the family's stock pipeline."""
        return super().__new__(cls if family is None else with_lora_loaders(cls, find_family(family)))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_2: PreTrainedModel,
        tokenizer_3: PreTrainedTokenizerBase,
        text_encoder_3: PreTrainedModel,
        vae: ModelMixin,
        transformer: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        processor: ProcessorMixin = None,
        timestep: int | list[int] = None,
        family: str = None,
        input_noise: str = "unit",
        max_sequence_length: int = None,
        embedded_guidance: float = None,
        sizes: list[list[int]] = None,
    ):
        super().__init__()
        if transformer is not None and unet is not None:
            raise ValueError("OneStepPipeline takes either a `transformer` or a `unet`")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            processor=processor,
            vae=vae,
            transformer=transformer,
            unet=unet,
            scheduler=scheduler,
        )
        if input_noise not in ("unit", "scaled"):
            raise ValueError(f"input_noise must be unit or scaled, but is {input_noise}")
        self.family, self.schedule = find_family(family), Schedule(scheduler)
        network = self.denoiser
        if embedded_guidance is None and network is not None and network.config.get("guidance_embeds"):
            embedded_guidance = self.family.embedded_guidance
        self.register_to_config(
            timestep=timestep,
            family=family,
            input_noise=input_noise,
            max_sequence_length=max_sequence_length or self.family.max_sequence_length,
            embedded_guidance=embedded_guidance,
            sizes=sizes,
        )
        first, last = self.schedule.first, self.schedule.last
        self.timesteps = list(timestep) if isinstance(timestep, (list, tuple)) else [timestep]
        if not self.timesteps or not all(t is not None and first <= t <= last for t in self.timesteps):
            raise ValueError(
                f"OneStepPipeline needs the generator's timestep t* in {first}..{last}, but got {timestep}"
            )
        if any(later >= t for t, later in zip(self.timesteps, self.timesteps[1:])):
            raise ValueError(f"the timesteps of OneStepPipeline must descend, but are {timestep}")
        draws = network is not None and vae is not None
        self.grid = self.family.grid(network.config, vae.config) if draws else None
        self.image_processor = VaeImageProcessor()

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """A config; an export's without the name of its own code, which `OneStepPipeline.from_pretrained` replaces."""
        config = super()._dict_from_json_file(json_file)
        if config.get("_class_name") == ["pipeline_one_step", cls.__name__]:
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "OneStepPipeline":
        """A one-step pipeline around the parts of another: a stock pipeline of a family, or one made of an export.

        Args:
            pipeline (`DiffusionPipeline`): whose parts are taken.
            kwargs: other parts, and arguments of [`OneStepPipeline`]; `timestep` defaults to what the pipeline had as
                a `OneStepPipeline`, or else to the family's. `dtype`, which parts are cast to, is float32 by default,
                as in every `from_pipe`.
        """
        config = pipeline.config
        own = kwargs.pop("family", None) or config.get("family", config.get("_family", type(pipeline).__name__))
        family = find_family(own)
        known = {"family": own, "timestep": config.get("timestep", config.get("_timestep", family.timestep))}
        known["scheduler"] = family.scheduler(pipeline.scheduler)
        parts = {name: getattr(pipeline, name, None) for name in (*cls._optional_components, "vae")}
        return super().from_pipe(pipeline, **{**parts, **known, **kwargs})

    @property
    def denoiser(self) -> ModelMixin | None:
        """The generator's network: the transformer or the UNet; None if there is none."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def num_timesteps(self) -> int:
        """How many steps, and so evaluations of the network, a picture takes."""
        return len(self.timesteps)

    def load_lora_weights(self, *args, **kwargs):
        """Where the family's stock pipeline has LoRA loaders, they stand in the place of this method."""
        raise ValueError(f"{self.config.family} loads no LoRA files, so neither does OneStepPipeline here")

    def enable_vae_tiling(self):
        """Decode large pictures in overlapping tiles; `pipe.vae.disable_tiling()` ends it."""
        self.vae.enable_tiling()

    def enable_vae_slicing(self):
        """Decode one picture of a batch after the other; `pipe.vae.disable_slicing()` ends it."""
        self.vae.enable_slicing()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, H / f, W / f) of the latents of one image; by default, of the size that the generator was trained for.

        Raises:
            ValueError: if height and width are no multiples of what latents and patches need, or the pipeline has no
                network or no VAE.
        """
        if self.grid is None:
            raise ValueError("this pipeline has no network or no VAE, so it encodes prompts and nothing else")
        grid = self.grid
        own = (self.config.sizes or [[grid.side, grid.side]])[0]
        height, width = height or own[0], width or own[1]
        if height % grid.multiple or width % grid.multiple:
            raise ValueError(f"height and width must be multiples of {grid.multiple}, but are {height} and {width}")
        return grid.channels, height // grid.factor, width // grid.factor

    def encode_prompt(self, prompt: str | list[str]) -> dict[str, torch.Tensor]:
        """The conditioning c of a prompt or a list of B prompts, which `pipe(prompt_embeds=c)` takes.

        Returns:
            `dict`: `encoder_hidden_states` (B, L, D); where it is masked, `encoder_attention_mask` (B, L); where there
            is a pooled state, `text_embeds` (SDXL) or `pooled_projections` (SD3, FLUX.1), (B, D_pooled); where the
            states of a second encoder stand apart (HunyuanImage), `encoder_hidden_states_2` and
            `encoder_attention_mask_2`.
        """
        return self.family.encode_prompt(self, [prompt] if isinstance(prompt, str) else prompt)

    def encode_null(self) -> dict[str, torch.Tensor]:
        """∅, one row: what the family's stock pipeline guides away from."""
        return self.family.encode_null(self)

    def denoise(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """One evaluation of a network of this family: its prediction for noisy latents, in float32.

        Args:
            network: the generator or another network of its class (reference, teaching assistant), wrapped or not.
            x_t (`torch.Tensor`, (B, C, H, W)): noisy latents.
            t (`torch.Tensor`, (B,), int64): timesteps.
            c (`dict`): conditioning from `encode_prompt`.

        Returns:
            `torch.Tensor`, (B, C, H, W): in the scheduler's prediction type; learned-sigma channels are left out.
        """
        return self.family.denoise(self, network, x_t.to(compute_dtype(network)), t, c).float()

    def estimate(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x̂0 (B, C, H, W), float32, of one evaluation; the arguments are those of `denoise`."""
        return self.schedule.x0(self.denoise(network, x_t, t, c), x_t, t)

    def generate(
        self,
        network: torch.nn.Module,
        z: torch.Tensor,
        c: dict[str, torch.Tensor],
        noise: torch.Tensor | Sequence[torch.Tensor] = (),
        step: torch.Tensor | None = None,
        on_step_end: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, latents: latents,
        all_steps: bool = False,
    ) -> torch.Tensor:
        """g_θ(z, c): latents x0 (B, C, H, W), float32, from unit noise z. Training and inference both call this.

        Of several steps only the one that gives a sample's x0 has a gradient.

        Args:
            network: as in `denoise`.
            z (`torch.Tensor`, (B, C, H, W)): unit noise; x_t of the first timestep is z, or σ_t z (`input_noise`).
            c (`dict`): conditioning from `encode_prompt`.
            noise (`torch.Tensor`, (n − 1, B, C, H, W), or a list): unit noise ε of each further step; none if n = 1.
            step (`torch.Tensor`, (B,), int64, *optional*): the step, in 0..n − 1, whose x0 each sample returns, for
                training on all of them; the last one by default.
            on_step_end (*optional*): `on_step_end(i, latents)` gives the latents to go on with after step i: x_t of
                the next step, and x0 after the last.
            all_steps: also compute steps that no sample of the batch goes as far as, with no effect: processes that
                hold one network together must take equally many.

        Raises:
            ValueError: if there is not one `noise` for each further step.
        """
        further = len(self.timesteps) - 1
        if len(noise) != further:
            raise ValueError(f"the generator takes {further} further step(s), but has `noise` for {len(noise)}")
        x_t, t = z, torch.full((len(z),), self.timesteps[0], dtype=torch.int64, device=z.device)
        step = torch.full_like(t, further) if step is None else step
        if self.config.input_noise == "scaled":
            x_t = self.schedule(t)[1] * z
        last = further if all_steps or not further else int(step.max())
        for i in range(1, last + 1):  # a sample that has reached its step stays where it is
            with torch.no_grad():
                x0 = self.estimate(network, x_t, t, c)
            t = torch.where(step >= i, self.timesteps[i], t)
            x_t = torch.where((step >= i).view(-1, 1, 1, 1), self.schedule.add_noise(x0, noise[i - 1], t), x_t)
            x_t = on_step_end(i - 1, x_t)
        return on_step_end(further, self.estimate(network, x_t, t, c))

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), float32, nominally in [0, 1], of latents x0; differentiable, beyond that range, too.
        What is transparent lies on white."""
        return self.family.opaque(self.pixels(x0))

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """As `decode`, not clamped, with transparency as a fourth channel where the model has it."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        if upcast:
            self.vae.float()  # SDXL's overflows in half precision
        pixels = self.family.decode(self, x0).float() / 2 + 0.5
        if upcast:
            self.vae.half()
        return pixels.contiguous()  # some VAEs leave the channels last

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | dict | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_2: torch.Tensor | None = None,
        prompt_attention_mask_2: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images in one network evaluation, or one for each of the config's timesteps.

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompts; or give `prompt_embeds` instead.
            height, width (`int`, *optional*): in pixels; default to the size that the generator was trained for.
            num_inference_steps, guidance_scale, negative_prompt (*optional*): of no effect: steps and guidance are
                those of the training. Taken where they say what happens anyway: the number of timesteps; 0 or 1, or
                what the network has as its input; nothing.
            num_images_per_prompt (`int`, defaults to 1): images of one prompt follow one another.
            generator (`torch.Generator` or list of them, *optional*): makes the result deterministic.
            latents (`torch.Tensor`, (B, C, H, W), *optional*): the noise z ~ N(0, I), instead of drawing it. The noise
                of further steps always comes from `generator`.
            prompt_embeds (`torch.Tensor`, (B, L, D), *optional*): encoded prompts, with
                prompt_attention_mask ((B, L)), pooled_prompt_embeds ((B, D)) or, of a second text encoder,
                prompt_embeds_2 ((B, L_2, D_2)) and prompt_attention_mask_2 ((B, L_2)), where the family has them; or
                what `encode_prompt` gives.
            output_type (`str`, defaults to "pil"): "pil", "np", "pt" ((B, 3, H, W) in [0, 1]) or "latent". Models
                that know transparency give a fourth channel.
            return_dict (`bool`, defaults to `True`): return `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): `callback(pipe, i, t, {"latents": latents})` after step i
                gives a `dict`, whose latents replace these: x_t of the next step, and x0 after the last.
            callback_on_step_end_tensor_inputs (`list[str]`): what it is given, "latents" or nothing.

        Raises:
            ValueError: for a prompt and embeddings at once or neither, an impossible size, latents of a wrong shape,
                an unknown output type, steps or guidance that the generator does not have.
        """
        shape = self.latent_shape(height, width)
        self.check_unchangeable(num_inference_steps, guidance_scale, negative_prompt)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either `prompt` or `prompt_embeds`, and not both")
        embeds = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "prompt_embeds_2": prompt_embeds_2,
            "prompt_attention_mask_2": prompt_attention_mask_2,
        }
        needed = self.family.conditions
        missing = [name for name in needed.values() if embeds[name] is None]
        if prompt is None and missing and not isinstance(prompt_embeds, dict):
            raise ValueError(f"`prompt_embeds` need their `{missing[0]}`")
        if prompt is not None and self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder: give `prompt_embeds` instead of a prompt")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end is given {self._callback_tensor_inputs} or nothing")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, but is {output_type}")

        device = self._execution_device
        if isinstance(prompt_embeds, dict):
            c = prompt_embeds
        elif prompt is None:
            c = {k: embeds[name] for k, name in needed.items()}
        else:
            c = self.encode_prompt(prompt)
        c = {k: v.to(device).repeat_interleave(num_images_per_prompt, dim=0) for k, v in c.items()}
        shape = (len(next(iter(c.values()))), *shape)

        random = {"generator": generator, "device": device, "dtype": self.denoiser.dtype}
        if latents is None:
            latents = randn_tensor(shape, **random)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, but have {tuple(latents.shape)}")
        noise = [randn_tensor(shape, **random) for _ in self.timesteps[1:]]

        def on_step_end(i, latents):
            if callback_on_step_end is None:
                return latents
            given = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
            return callback_on_step_end(self, i, self.timesteps[i], given).get("latents", latents)

        x0 = self.generate(self.denoiser, latents.to(device), c, noise, on_step_end=on_step_end)

        if output_type == "latent":
            images = x0
        else:
            pixels = self.pixels(x0) * 2 - 1
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_unchangeable(self, steps, guidance_scale, negative_prompt):
        """Raises ValueError if a call asks for steps or guidance that are not the generator's own."""
        if steps not in (None, self.num_timesteps):
            raise ValueError(
                f"this generator takes {self.num_timesteps} step(s), so num_inference_steps is not {steps}"
            )
        embedded = self.config.embedded_guidance
        own = (0, self.family.guide(1.0, None, 1).get("guidance_scale", 1)) if embedded is None else (embedded,)
        if guidance_scale is not None and guidance_scale not in own:
            raise ValueError(
                f"guidance_scale must be {own[-1]}, as in this generator's training, but is {guidance_scale}"
            )
        if negative_prompt:
            raise ValueError("this generator draws without guidance, so a negative_prompt says nothing: leave it out")

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Write `model_index.json` in the form that names its own code, and this code, with its family, beside it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        index = os.path.join(save_directory, self.config_name)
        with open(index) as f:
            config = json.load(f)
        config["_class_name"] = ["pipeline_one_step", type(self).__name__]
        with open(index, "w") as f:
            json.dump(config, f, indent=2)
            f.write("\n")
        Path(save_directory, "pipeline_one_step.py").write_text(self.family.code or self.code)


# What a family must say, and what several of them share.


# Ends of the names of layers that get adapters, as diffusers calls them in most networks.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONTEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


def layers(ends, *patterns):
    """One pattern of whole names of layers: those with these ends, and those that one of the patterns matches."""
    return "|".join([rf".*\.(?:{'|'.join(ends)})", *patterns])


class Grid(NamedTuple):
    """The latents of a model: C channels, a side of 1/`factor` of the image's; the image's side must be a multiple of
    `multiple` and is by default `side` (pixels)."""

    channels: int
    factor: int
    multiple: int
    side: int


class Family:
    """What tells one family of models from another: one subclass, in one file, named by its stock pipeline.

    The methods are how it encodes prompts, calls its network and decodes latents, in training as in an export. Each
    has, as static or class methods,
    `encode_prompt(pipe, prompt)`: c, a `dict` of tensors with B rows, of a list of B prompts;
    `denoise(pipe, network, x_t, t, c)`: the network's output (B, C, H, W) for x_t (B, C, H, W), in its own dtype, of
    the kind that the [`Schedule`] says: another clock, sign, packing stay inside.
    """

    name = None  # class name of the stock pipeline
    denoiser = "transformer"  # name of its network, or "unet"
    flow = True  # whether it matches flows; else its schedule has betas
    timestep = 1000  # t*, where a generator is evaluated if nobody says; flow matching starts at σ = 1
    conditions = {}  # what c consists of, and the arguments of the pipeline that give it
    max_sequence_length = None  # tokens that prompts are cut to, where the tokenizer does not say
    embedded_guidance = None  # of networks that take a guidance scale as an input: the stock's
    null_prompt = ""  # what ∅ is the encoding of
    has_null = True  # whether the reference knows ∅, so whether α_cfg may be other than 1
    renormalised = None  # what the stock does to guidance that is not ∅ + α (c − ∅) and cannot be turned off
    optional = ()  # text encoders that a published pipeline may lack
    unused = ()  # parts of the stock pipeline that text-to-image does not need
    alone = False  # whether the stock's picture of a prompt depends on the others of a call, so that it gets its own
    assumed = {}  # settings in the stock's `model_index.json` that the methods below take for granted
    options = {}  # arguments with which the stock pipeline draws just what it is asked for
    unguided = {"guidance_scale": 1.0}  # its arguments for c alone
    lora_targets = (*ATTENTION, *FEED_FORWARD)  # ends of layers' names, or one pattern of whole names
    left_out = ()  # lists of blocks that diffusers does not checkpoint, though they hold much
    unrounded = ()  # parts of names of layers in its blocks that a rounded base keeps as they are
    modulation = ("norm", "mod", "adaLN")  # and words in the names of those that it keeps at 8 bits at least
    code = None  # the whole file of an export, where the family is defined outside of it
    apps = None  # layouts and numbers of other programs, see `diff_instruct/export/apps.py`

    @classmethod
    def stock(cls):
        """Class of the stock pipeline; diffusers imports it when it is asked for."""
        return getattr(diffusers, cls.name)

    @classmethod
    def scheduler(cls, scheduler):
        """What an export has of a scheduler: its noise, in the form in which the stock pipeline takes timesteps as
        they are.

        The published schedulers of flow matching shift the noise levels that they are given (Qwen-Image's even to
        NaN); this one does not, and its further steps renoise as the generator's do.
        """
        if cls.flow:
            steps = scheduler.config.num_train_timesteps
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=1.0, stochastic_sampling=True)
        options = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}
        return DDPMScheduler.from_config(scheduler.config, **options)

    @classmethod
    def has_lora_files(cls):
        """Whether the stock pipeline loads LoRA files."""
        return hasattr(cls.stock(), "save_lora_weights")

    @classmethod
    def encode_null(cls, pipe):
        """∅, a `dict` of tensors with one row, as the stock pipeline guides away from."""
        return cls.encode_prompt(pipe, [cls.null_prompt])

    @staticmethod
    def grid(network, vae):
        """The [`Grid`] of the configs of network and VAE."""
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return Grid(network.in_channels, factor, factor * network.get("patch_size", 1), network.sample_size * factor)

    @staticmethod
    def decode(pipe, x0):
        """The VAE's pixels (B, 3, H, W), nominally in [−1, 1]; or (B, 4, H, W), if it knows transparency."""
        config = pipe.vae.config
        latents = x0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]

    @staticmethod
    def opaque(pixels):
        """What one sees of pixels in [0, 1], (B, 3, H, W): those of `decode`, without transparency."""
        return pixels

    @staticmethod
    def guide(alpha, embedded, n):
        """Arguments of the stock pipeline for ∅ + α (c − ∅) of n prompts, and an embedded guidance."""
        return {"guidance_scale": alpha}

    @staticmethod
    def set_guidance(stock, alpha):
        """Make the stock pipeline guide with ∅ + α (c − ∅), where its call has no argument for that."""

    @staticmethod
    def unsupported(network):
        """Why a network of this config cannot be trained, the end of a line that names it; None if it can."""
        return None

    @staticmethod
    def tokens(x):
        """Latents (B, C, H, W) in the form in which the stock's sampler holds them and draws noise."""
        return x

    @staticmethod
    def from_tokens(tokens, shape):
        """The inverse of `tokens`, for latents of this shape."""
        return tokens

    @staticmethod
    def stock_latents(z, sigma=1.0):
        """Noise that is to enter at σ, (B, C, H, W), in the form of the stock's argument `latents`."""
        return z

    @staticmethod
    def checkpointed(checkpoint):
        """What its network's `enable_gradient_checkpointing` is given, made of `checkpoint(block, ...)`: another
        function where the network, when it checkpoints, forgets an argument of a block."""
        return checkpoint

    @classmethod
    def from_stock_latents(cls, stock, latents, shape):
        """x0 of this shape, of what the stock pipeline gives as `output_type="latent"`."""
        return cls.from_tokens(latents, shape)

    @staticmethod
    def text_node(pipe):
        """The node of ComfyUI that encodes a prompt for an export, `pipe`."""
        return "CLIPTextEncode"

    @classmethod
    def may_lack(cls):
        """Names of the parts that may be None in the stock pipeline, but must be given."""
        return tuple(name for part in cls.optional for name in (part, part.replace("text_encoder", "tokenizer")))

    @classmethod
    def stock_setup(cls):
        """Lines of Python that make `stock`, the stock pipeline around the parts of an export, `pipe`, as they are:
        `from_pipe` would cast them, which quantised networks refuse."""
        without = "".join(f", {name}=None" for name in cls.unused)
        without += ", requires_safety_checker=False" if "safety_checker" in cls.unused else ""
        kept = f" or name in {cls.may_lack()}" if cls.optional else ""
        lines = [f"parts = {{name: part for name, part in pipe.components.items() if part is not None{kept}}}"]
        if not cls.flow:
            lines.append('parts["scheduler"] = LCMScheduler.from_config(pipe.scheduler.config)')
        lines.append(f"stock = {cls.name}(**parts{without})")
        names = cls.name if cls.flow else ", ".join(sorted(["LCMScheduler", cls.name]))
        return "\n".join([f"from diffusers import {names}", *lines, ""])

    @classmethod
    def stock_arguments(cls, pipe):
        """Arguments, beside the prompt, with which the stock pipeline takes the steps of an export, `pipe`."""
        steps = {"num_inference_steps": len(pipe.timesteps)}
        if cls.flow:
            steps["sigmas"] = [t / pipe.schedule.steps for t in pipe.timesteps]
        else:
            steps["timesteps"] = pipe.timesteps
        return {**steps, **cls.unguided, **cls.options}


def find_family(name):
    """The [`Family`] of a stock pipeline's class name, among those that are defined.

    Raises:
        ValueError: if there is none: an export's own file holds its family, the package `diff_instruct` all.
    """
    found, classes = {}, [Family]
    while classes:
        cls = classes.pop()
        found[cls.name] = cls
        classes += cls.__subclasses__()
    if name is None or name not in found:
        raise ValueError(
            f"no family {name} is defined here: load an export with DiffusionPipeline.from_pretrained(..., "
            "trust_remote_code=True), whose own file defines it, or import diff_instruct.families"
        )
    return found[name]


def tokenize(tokenizer, text_encoder, prompt, length=None):
    """Tokens of B prompts, padded on the right to one length (by default the tokenizer's), where the encoder is."""
    options = {"padding": "max_length", "padding_side": "right", "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompt, max_length=length, **options).to(device_of(text_encoder))


def chats(pipe, prompt, enable_thinking):
    """B prompts, each as what a user says, with the answer about to begin."""
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": enable_thinking}
    return [pipe.tokenizer.apply_chat_template([{"role": "user", "content": p}], **options) for p in prompt]


def masked_states(pipe, prompt):
    """c of a language model's last states but one (B, L, D), and the mask (B, L) of what is no padding."""
    tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, pipe.config.max_sequence_length)
    options = {"attention_mask": tokens.attention_mask, "output_hidden_states": True}
    states = pipe.text_encoder(tokens.input_ids, **options).hidden_states[-2]
    return {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask}


def masked_tokens(c, dtype):
    """The rows of tokens of c, a list of B tensors (L_i, D), without their padding."""
    return [e[m.bool()].to(dtype) for e, m in zip(c["encoder_hidden_states"], c["encoder_attention_mask"])]


def pack(x):
    """Latents (B, C, H, W) to tokens of 2×2 patches, (B, HW/4, 4C)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens, shape):
    """The inverse of `pack` for latents of this shape."""
    b, c, h, w = shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def positions(height, width, axes, device):
    """Ids (height · width, axes) of a grid of tokens: 0, row, column, and zeros for further axes."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)
    return ids.view(-1, axes)
