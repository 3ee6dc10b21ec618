# SPDX-License-Identifier: Apache-2.0
"""One-step text-to-image pipeline: one evaluation of a diffusion network at one fixed timestep t*.

A generator that was trained for it takes a few such steps, one evaluation at each of several fixed timesteps.

It runs the families in `FAMILIES`: PixArt-α, Stable Diffusion and SDXL; and of flow matching SD3, Sana, Z-Image, FLUX,
Qwen-Image and Lumina 2. This file travels with the weights, so it needs nothing but torch, diffusers and transformers.
The first half, schedule and pipeline, is what all families share; the second has a class for each.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("user/model", trust_remote_code=True)
    image = pipe("a red apple").images[0]
"""

import inspect
import json
import os
import shutil
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device_of(module):
    """Where a module computes: with accelerate's offloading its weights may be elsewhere, or nowhere yet."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None) or module.device


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

    def __init__(self, scheduler, device="cpu"):
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
        if self.prediction_type not in ("epsilon", "sample", "v_prediction", "flow"):
            raise ValueError(f"prediction_type `{self.prediction_type}` is not one of epsilon, sample, v_prediction")
        self.alphas, self.sigmas = self.alphas.to(device), self.sigmas.to(device)

    def __call__(self, t):
        """α_t and σ_t, each (B, 1, 1, 1), of integer timesteps t (B,)."""
        if self.alphas.device != t.device:
            self.alphas, self.sigmas = self.alphas.to(t.device), self.sigmas.to(t.device)
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def timesteps(self, u, low, high):
        """π(t): t uniform on the integers of [low·T, high·T], both ends included, from u ~ U[0, 1), (B,).

        The ends where α or σ is 0 are left out: scores and weightings are infinite there.
        """
        first, last = max(round(low * self.steps), self.first), min(round(high * self.steps), self.steps - 1)
        return first + (u * (last - first + 1)).long().to(self.alphas.device)

    def add_noise(self, x0, eps, t):
        """x_t = α_t x0 + σ_t ε, all (B, C, H, W)."""
        alpha, sigma = self(t)
        return alpha * x0 + sigma * eps

    def x0(self, output, x_t, t):
        """The network's output to its estimate x̂0 of the clean latents, (B, C, H, W), float32."""
        (alpha, sigma), output, x_t = self(t), output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * output
        return x_t - sigma * output

    def epsilon(self, output, x_t, t):
        """The network's output to its estimate ε̂ of the noise, (B, C, H, W), float32."""
        (alpha, sigma), output, x_t = self(t), output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "flow":
            return x_t + alpha * output
        return (x_t - alpha * self.x0(output, x_t, t)) / sigma

    def loss_weight(self, t):
        """λ(t), (B, 1, 1, 1), of ‖ε̂ − ε‖² in the loss of a network of this kind: 1; for flow matching 1/α_t², which
        makes it the plain loss ‖v̂ − v‖² (an unweighted one leaves the high noise levels, where x0 is made, unlearnt).
        """
        alpha, _ = self(t)
        return 1 / alpha**2 if self.prediction_type == "flow" else torch.ones_like(alpha)


class OneStepPipeline(DiffusionPipeline):
    r"""
    A one-step generator g_θ(z, c) = x̂0 of the network's output at (z, t*), with z ~ N(0, I) fed as x_{t*}.

    With several timesteps t_1 > ... > t_n it takes n steps, as consistency models and DMD2 do: x0 at t_1 as above;
    then x_{t_2} = α x0 + σ ε with fresh noise ε, and x̂0 of the output at (x_{t_2}, t_2) is the new x0; and so on.

    The same weights also run in the stock pipeline of the family with these timesteps (see the model card). Every
    component must be given; those that the family does not have, and text encoders if embeddings will be given
    instead of prompts, are None.

    Args:
        tokenizer, text_encoder: turn the prompt into the conditioning c: T5 for PixArt-α, CLIP for Stable Diffusion.
        tokenizer_2, text_encoder_2: the second ones of SDXL, SD3 and FLUX.1; tokenizer_3, text_encoder_3: SD3's T5.
        vae: decodes latents to pixels.
        transformer, unet: the generator, one of the two.
        scheduler: holds the noise schedule and the prediction type; it is not stepped here.
        timestep (`int` or `list[int]`): t*, the timestep at which the generator was trained; or n descending ones.
        family (`str`): class name of the stock pipeline, a key of `FAMILIES`; exports that name none are PixArt-α,
            Stable Diffusion or SDXL.
        input_noise (`str`, defaults to "unit"): what enters at t*: z ("unit"), or σ_t z ("scaled"), as ComfyUI and
            SIM's checkpoints have it. The same thing at σ = 1.
        max_sequence_length (`int`, defaults to the family's): prompts are cut to this number of tokens.
        embedded_guidance (`float`, defaults to the family's): what networks with guidance as an input are given.

    Raises:
        ValueError: if t* is missing or lies outside the schedule, several do not descend, not just one network is
            given, or a config value is unknown.
    """

    _optional_components = [
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
        "transformer",
        "unet",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->unet->vae"

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
        timestep: int | list[int] = None,
        family: str = None,
        input_noise: str = "unit",
        max_sequence_length: int = None,
        embedded_guidance: float = None,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            raise ValueError("OneStepPipeline needs either a `transformer` or a `unet`")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            vae=vae,
            transformer=transformer,
            unet=unet,
            scheduler=scheduler,
        )
        family = family or family_of(transformer, unet)
        if family not in FAMILIES:
            raise ValueError(f"OneStepPipeline knows no family {family}; it knows {', '.join(FAMILIES)}")
        if input_noise not in ("unit", "scaled"):
            raise ValueError(f"input_noise must be unit or scaled, but is {input_noise}")
        self.family, self.schedule = FAMILIES[family], Schedule(scheduler)
        if embedded_guidance is None and self.denoiser.config.get("guidance_embeds"):
            embedded_guidance = self.family.embedded_guidance
        self.register_to_config(
            timestep=timestep,
            family=family,
            input_noise=input_noise,
            max_sequence_length=max_sequence_length or self.family.max_sequence_length,
            embedded_guidance=embedded_guidance,
        )
        first, last = self.schedule.first, self.schedule.last
        self.timesteps = list(timestep) if isinstance(timestep, (list, tuple)) else [timestep]
        if not self.timesteps or not all(t is not None and first <= t <= last for t in self.timesteps):
            raise ValueError(
                f"OneStepPipeline needs the generator's timestep t* in {first}..{last}, but got {timestep}"
            )
        if any(later >= t for t, later in zip(self.timesteps, self.timesteps[1:])):
            raise ValueError(f"the timesteps of OneStepPipeline must descend, but are {timestep}")
        self.grid = self.family.grid(self.denoiser.config, vae.config)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.grid.factor)

    @property
    def denoiser(self):
        """The generator's network: the transformer or the UNet."""
        return self.unet if self.transformer is None else self.transformer

    def latent_shape(self, height=None, width=None):
        """(C, H / f, W / f) of the latents of one image; by default, of the size that the generator was trained for.

        Raises:
            ValueError: if height and width are no multiples of what latents and patches need.
        """
        grid = self.grid
        height, width = height or grid.side, width or grid.side
        if height % grid.multiple or width % grid.multiple:
            raise ValueError(f"height and width must be multiples of {grid.multiple}, but are {height} and {width}")
        return grid.channels, height // grid.factor, width // grid.factor

    def encode_prompt(self, prompt):
        """The conditioning c of a list of B prompts: keyword arguments of `denoise`, each with B rows.

        Returns:
            `dict`: `encoder_hidden_states` (B, L, D); where it is masked, `encoder_attention_mask` (B, L); where there
            is a pooled state, `text_embeds` (SDXL) or `pooled_projections` (SD3, FLUX.1), (B, D_pooled).
        """
        return self.family.encode_prompt(self, prompt)

    def encode_null(self):
        """∅, one row: what the family's stock pipeline guides away from."""
        return self.family.encode_null(self)

    def denoise(self, network, x_t, t, c):
        """One evaluation of a network of this family: its prediction for noisy latents, in float32.

        Args:
            network: the generator or another network of its class (reference, teaching assistant), wrapped or not.
            x_t (`torch.Tensor`, (B, C, H, W)): noisy latents.
            t (`torch.Tensor`, (B,), int64): timesteps.
            c (`dict`): conditioning from `encode_prompt`.

        Returns:
            `torch.Tensor`, (B, C, H, W): in the scheduler's prediction type; learned-sigma channels are left out.
        """
        return self.family.denoise(self, network, x_t.to(next(network.parameters()).dtype), t, c).float()

    def estimate(self, network, x_t, t, c):
        """x̂0 (B, C, H, W), float32, of one evaluation; the arguments are those of `denoise`."""
        return self.schedule.x0(self.denoise(network, x_t, t, c), x_t, t)

    def generate(self, network, z, c, noise=(), step=None):
        """g_θ(z, c): latents x0 (B, C, H, W), float32, from unit noise z. Training and inference both call this.

        Of several steps only the one that gives a sample's x0 has a gradient.

        Args:
            network: as in `denoise`.
            z (`torch.Tensor`, (B, C, H, W)): unit noise; x_t of the first timestep is z, or σ_t z (`input_noise`).
            c (`dict`): conditioning from `encode_prompt`.
            noise (`torch.Tensor`, (n − 1, B, C, H, W), or a list): unit noise ε of each further step; none if n = 1.
            step (`torch.Tensor`, (B,), int64, *optional*): the step, in 0..n − 1, whose x0 each sample returns, for
                training on all of them; the last one by default.

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
        for i in range(1, len(self.timesteps)):  # a sample that has reached its step stays where it is
            with torch.no_grad():
                x0 = self.estimate(network, x_t, t, c)
            t = torch.where(step >= i, self.timesteps[i], t)
            x_t = torch.where((step >= i).view(-1, 1, 1, 1), self.schedule.add_noise(x0, noise[i - 1], t), x_t)
        return self.estimate(network, x_t, t, c)

    def decode(self, x0):
        """Pixels (B, 3, H, W), float32, nominally in [0, 1] but not clamped, of latents x0; differentiable."""
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
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        r"""
        Generate images in one network evaluation, or one for each of the config's timesteps.

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompts; or give `prompt_embeds` instead.
            height, width (`int`, *optional*): in pixels; default to the size that the generator was trained for.
            num_images_per_prompt (`int`, defaults to 1): images of one prompt follow one another.
            generator (`torch.Generator` or list of them, *optional*): makes the result deterministic.
            latents (`torch.Tensor`, (B, C, H, W), *optional*): the noise z ~ N(0, I), instead of drawing it. The noise
                of further steps always comes from `generator`.
            prompt_embeds (`torch.Tensor`, (B, L, D), *optional*): encoded prompts, with
                prompt_attention_mask ((B, L)) or pooled_prompt_embeds ((B, D)), where the family has them.
            output_type (`str`, defaults to "pil"): "pil", "np", "pt" ((B, 3, H, W) in [0, 1]) or "latent".
            return_dict (`bool`, defaults to `True`): return `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: for a prompt and embeddings at once or neither, an impossible size, latents of a wrong shape,
                an unknown output type.
        """
        shape = self.latent_shape(height, width)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either `prompt` or `prompt_embeds`, and not both")
        embeds = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "pooled_prompt_embeds": pooled_prompt_embeds,
        }
        needed = self.family.conditions
        missing = [name for name in needed.values() if embeds[name] is None]
        if prompt is None and missing:
            raise ValueError(f"`prompt_embeds` need their `{missing[0]}`")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, but is {output_type}")

        device = self._execution_device
        if prompt is None:
            c = {k: embeds[name] for k, name in needed.items()}
        else:
            c = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt)
        c = {k: v.to(device).repeat_interleave(num_images_per_prompt, dim=0) for k, v in c.items()}
        shape = (len(next(iter(c.values()))), *shape)

        random = {"generator": generator, "device": device, "dtype": self.denoiser.dtype}
        if latents is None:
            latents = randn_tensor(shape, **random)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, but have {tuple(latents.shape)}")
        noise = [randn_tensor(shape, **random) for _ in self.timesteps[1:]]
        x0 = self.generate(self.denoiser, latents.to(device), c, noise)

        if output_type == "latent":
            images = x0
        else:
            pixels = self.decode(x0) * 2 - 1
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Write `model_index.json` in the form that names this file, and the file itself beside it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source, index = inspect.getfile(type(self)), os.path.join(save_directory, self.config_name)
        with open(index) as f:
            config = json.load(f)
        config["_class_name"] = ["pipeline_one_step", type(self).__name__]
        with open(index, "w") as f:
            json.dump(config, f, indent=2)
            f.write("\n")
        target = os.path.join(save_directory, "pipeline_one_step.py")
        if not (os.path.exists(target) and os.path.samefile(source, target)):
            shutil.copyfile(source, target)


# The families: how each encodes prompts, calls its network and decodes latents.


class Grid(NamedTuple):
    """The latents of a model: C channels, a side of 1/`factor` of the image's; the image's side must be a multiple of
    `multiple` and is by default `side` (pixels)."""

    channels: int
    factor: int
    multiple: int
    side: int


class Family:
    """What tells one family of models from another; a stock pipeline's class name finds its own in `FAMILIES`.

    Each has, as static or class methods,
    `encode_prompt(pipe, prompt)`: c, a `dict` of tensors with B rows, of a list of B prompts;
    `denoise(pipe, network, x_t, t, c)`: the network's output (B, C, H, W) for x_t (B, C, H, W), in its own dtype.
    """

    conditions = {}  # what c consists of, and the arguments of the pipeline that give it
    max_sequence_length = None  # tokens that prompts are cut to, where the tokenizer does not say
    embedded_guidance = None  # of networks that take a guidance scale as an input: the stock's
    null_prompt = ""  # what ∅ is the encoding of

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
        """The VAE's pixels (B, 3, H, W), nominally in [−1, 1]."""
        config = pipe.vae.config
        latents = x0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]


class PixArtAlpha(Family):
    """PixArt-α: a transformer with learned sigma that attends to T5's states, under their mask."""

    max_sequence_length = 120
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        prompt, length = [p.lower().strip() for p in prompt], pipe.config.max_sequence_length
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(device_of(pipe.text_encoder))
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": tokens.attention_mask}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        micro = {"resolution": None, "aspect_ratio": None}
        if pipe.denoiser.config.sample_size == 128:  # PixArt-α at 1024 pixels is also conditioned on the size
            height, width = (n * pipe.grid.factor for n in x_t.shape[-2:])
            size = torch.tensor([[height, width]], dtype=x_t.dtype, device=x_t.device)
            ratio = torch.tensor([[height / width]], dtype=x_t.dtype, device=x_t.device)
            micro = {"resolution": size.repeat(len(x_t), 1), "aspect_ratio": ratio.repeat(len(x_t), 1)}
        output = network(
            x_t,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=c["encoder_attention_mask"],
            timestep=t,
            added_cond_kwargs=micro,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]  # the rest is the learned sigma


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: a UNet that attends to all of CLIP's states, without a mask."""

    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        return {"encoder_hidden_states": pipe.text_encoder(tokens.input_ids.to(device_of(pipe.text_encoder)))[0]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        return network(x_t, t, encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype), return_dict=False)[0]


class StableDiffusionXL(Family):
    """SDXL: a UNet that attends to the states of two CLIPs, and is conditioned on a pooled one and on the size."""

    conditions = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        states = []
        for tokenizer, text_encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
            output = text_encoder(tokens.input_ids.to(device_of(text_encoder)), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": output.text_embeds}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        height, width = (n * pipe.grid.factor for n in x_t.shape[-2:])
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x_t.device)
        return network(
            x_t,
            t,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            added_cond_kwargs={"text_embeds": c["text_embeds"].to(x_t.dtype), "time_ids": size.repeat(len(x_t), 1)},
            return_dict=False,
        )[0]


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


class StableDiffusion3(Family):
    """SD3 and 3.5: a transformer that attends to the states of two CLIPs and of T5, padding included; pooled CLIPs."""

    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        states, pooled = [], []
        for tokenizer, text_encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            tokens = tokenize(tokenizer, text_encoder, prompt)
            output = text_encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clips, length = torch.cat(states, dim=-1), pipe.config.max_sequence_length
        if pipe.text_encoder_3 is None:  # the model may be used without its largest encoder
            t5 = clips.new_zeros(len(clips), length, pipe.denoiser.config.joint_attention_dim)
        else:
            tokens = tokenize(pipe.tokenizer_3, pipe.text_encoder_3, prompt, length)
            t5 = pipe.text_encoder_3(tokens.input_ids)[0]
        clips = torch.nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        embeds = torch.cat([clips, t5.to(clips.device)], dim=1)
        return {"encoder_hidden_states": embeds, "pooled_projections": torch.cat(pooled, dim=-1)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c = {k: v.to(x_t.dtype) for k, v in c.items()}
        return network(hidden_states=x_t, timestep=t, **c, return_dict=False)[0]


class Sana(Family):
    """Sana: a transformer that attends to Gemma's states, under their mask; the instruction before each prompt is the
    stock's, and is cut off again."""

    max_sequence_length = 300
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        from diffusers import SanaPipeline  # here: nobody else waits for it

        stock_call = inspect.signature(SanaPipeline.__call__).parameters
        instruction = "\n".join(stock_call["complex_human_instruction"].default)
        return Sana.encode(pipe, prompt, instruction, len(pipe.tokenizer.encode(instruction)) - 2)

    @classmethod
    def encode_null(cls, pipe):
        return cls.encode(pipe, [""])  # without the instruction

    @staticmethod
    def encode(pipe, prompt, instruction="", length=0):
        kept, prompt = pipe.config.max_sequence_length, [instruction + p.lower().strip() for p in prompt]
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, length + kept)
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        c = {"encoder_hidden_states": embeds, "encoder_attention_mask": tokens.attention_mask}
        return {k: torch.cat([v[:, :1], v[:, 1 - kept :]], dim=1) for k, v in c.items()}

    @staticmethod
    def denoise(pipe, network, x_t, t, c, **options):
        options = options or {"timestep": t * pipe.denoiser.config.timestep_scale}
        mask, c = c["encoder_attention_mask"], c["encoder_hidden_states"].to(x_t.dtype)
        output = network(x_t, encoder_hidden_states=c, encoder_attention_mask=mask, return_dict=False, **options)
        return output[0][:, : x_t.shape[1]]

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.encoder_block_out_channels) - 1)
        return Grid(network.in_channels, factor, factor * network.patch_size, network.sample_size * factor)


class SanaSprint(Sana):
    """Sana-Sprint: Sana with guidance as an input. It knows no ∅. Its trigonometric flow at angle a is the straight
    one at σ = sin a / (sin a + cos a), which is what its network takes as the time."""

    embedded_guidance = 4.5

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        guidance = pipe.config.embedded_guidance * pipe.denoiser.config.guidance_embeds_scale
        guidance = torch.full((len(t),), guidance, dtype=x_t.dtype, device=t.device)
        return Sana.denoise(pipe, network, x_t, t, c, timestep=t / pipe.schedule.steps, guidance=guidance)


class ZImage(Family):
    """Z-Image: a transformer over the tokens of image and prompt (Qwen3's states of a chat); x0 − ε, time runs up."""

    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        return masked_states(pipe, chats(pipe, prompt, enable_thinking=True))

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        time, images = (pipe.schedule.steps - t) / pipe.schedule.steps, list(x_t.unsqueeze(2).unbind())
        output = network(images, time, masked_tokens(c, x_t.dtype), return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return Grid(network.in_channels, factor, 2 * factor, 128 * factor)


class Flux(Family):
    """FLUX.1: a transformer over the tokens of image and prompt (T5's states, padding included), with CLIP's pooled
    state; dev takes guidance as an input."""

    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    embedded_guidance = 3.5

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt)
        pooled = pipe.text_encoder(tokens.input_ids).pooler_output
        tokens = tokenize(pipe.tokenizer_2, pipe.text_encoder_2, prompt, pipe.config.max_sequence_length)
        return {"encoder_hidden_states": pipe.text_encoder_2(tokens.input_ids)[0], "pooled_projections": pooled}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        c, guidance = {k: v.to(x_t.dtype) for k, v in c.items()}, pipe.config.embedded_guidance
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            guidance=None if guidance is None else torch.full((len(t),), guidance, device=t.device),
            txt_ids=torch.zeros(c["encoder_hidden_states"].shape[1], 3, device=t.device),
            img_ids=positions(x_t.shape[2] // 2, x_t.shape[3] // 2, 3, t.device),
            return_dict=False,
            **c,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return Grid(network.in_channels // 4, factor, 2 * factor, 128 * factor)


class Flux2Klein(Family):
    """FLUX.2 klein: a transformer over the tokens of image and prompt (three of Qwen3's states of a chat, padding
    included). A latent is a 2×2 patch of the VAE's, normalised by the VAE's batch statistics."""

    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        prompt = chats(pipe, prompt, enable_thinking=False)
        tokens = tokenize(pipe.tokenizer, pipe.text_encoder, prompt, pipe.config.max_sequence_length)
        options = {"attention_mask": tokens.attention_mask, "output_hidden_states": True, "use_cache": False}
        states = pipe.text_encoder(tokens.input_ids, **options).hidden_states
        return {"encoder_hidden_states": torch.cat([states[k] for k in (9, 18, 27)], dim=-1)}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        (b, _, height, width), c = x_t.shape, c["encoder_hidden_states"].to(x_t.dtype)
        txt_ids = torch.zeros(b, c.shape[1], 4, device=t.device)
        txt_ids[..., 3] += torch.arange(c.shape[1], device=t.device)
        output = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            guidance=None,
            encoder_hidden_states=c,
            txt_ids=txt_ids,
            img_ids=positions(height, width, 4, t.device).expand(b, -1, -1),
            return_dict=False,
        )
        return output[0].transpose(1, 2).reshape(x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** len(vae.block_out_channels)
        return Grid(network.in_channels, factor, factor, 64 * factor)

    @staticmethod
    def decode(pipe, x0):
        statistics, (b, c, h, w) = pipe.vae.bn, x0.shape
        std = (statistics.running_var.to(x0) + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        x0 = (x0 * std + statistics.running_mean.to(x0).view(1, -1, 1, 1)).view(b, c // 4, 2, 2, h, w)
        latents = x0.permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]


class QwenImage(Family):
    """Qwen-Image: a transformer over the tokens of image and prompt (Qwen2.5-VL's states of a chat, without those of
    the system's message), under a mask; the VAE is that of a video, here of one frame."""

    max_sequence_length = 512
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    null_prompt = " "
    template = (  # what the model was trained with, 34 tokens before the prompt
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    before = 34

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        options = {"padding": True, "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        prompt, length = [cls.template.format(p) for p in prompt], pipe.config.max_sequence_length
        tokens = pipe.tokenizer(prompt, max_length=length + cls.before, **options).to(device_of(pipe.text_encoder))
        mask = tokens.attention_mask
        states = pipe.text_encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return {"encoder_hidden_states": states[-1][:, cls.before :], "encoder_attention_mask": mask[:, cls.before :]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        b, _, height, width = x_t.shape
        output = network(
            hidden_states=pack(x_t),
            timestep=t.to(x_t.dtype) / pipe.schedule.steps,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_mask=c["encoder_attention_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * b,
            return_dict=False,
        )
        return unpack(output[0], x_t.shape)

    @staticmethod
    def grid(network, vae):
        factor = 2 ** len(vae.temperal_downsample)
        return Grid(network.in_channels // 4, factor, 2 * factor, 128 * factor)

    @staticmethod
    def decode(pipe, x0):
        """Through the VAE's parts: its `decode` clamps, and beyond [−1, 1] a reward would have no gradient."""
        vae = pipe.vae
        if hasattr(vae, "_hf_hook"):  # with accelerate's offloading
            vae._hf_hook.pre_forward(vae)
        mean, std = (
            torch.tensor(v, device=x0.device).view(1, -1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = (x0 * std + mean).to(vae.dtype).unsqueeze(2)
        return vae.decoder(vae.post_quant_conv(latents))[:, :, 0]


class Lumina2(Family):
    """Lumina-Image 2.0: a transformer over the tokens of image and prompt (Gemma's states); x0 − ε, time runs up."""

    max_sequence_length = 256
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    instruction = (  # what the model was trained with
        "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
        "based on textual prompts or user prompts. <Prompt Start> "
    )

    @classmethod
    def encode_prompt(cls, pipe, prompt):
        return masked_states(pipe, [cls.instruction + p for p in prompt])

    @classmethod
    def encode_null(cls, pipe):
        return masked_states(pipe, [""])  # without the instruction

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        mask, c = c["encoder_attention_mask"], c["encoder_hidden_states"].to(x_t.dtype)
        time, masked = 1 - t / pipe.schedule.steps, {"encoder_hidden_states": c, "encoder_attention_mask": mask}
        return -network(hidden_states=x_t, timestep=time, **masked, return_dict=False)[0]


FAMILIES = {
    "PixArtAlphaPipeline": PixArtAlpha,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "SanaPipeline": Sana,
    "SanaSprintPipeline": SanaSprint,
    "ZImagePipeline": ZImage,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "QwenImagePipeline": QwenImage,
    "Lumina2Pipeline": Lumina2,
}


def family_of(transformer, unet):
    """The class name of the stock pipeline, for exports that do not name it: they are of one of three families."""
    if transformer is not None:
        return "PixArtAlphaPipeline"
    sdxl = unet.config.addition_embed_type == "text_time"
    return "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
