"""One-step text-to-image pipeline: one evaluation of a diffusion network at one fixed timestep t*.

A generator that was trained for it takes a few such steps, one evaluation at each of several fixed timesteps.

It runs three families: PixArt-α, Stable Diffusion (1.x and 2.x) and SDXL. This file travels with the weights, so it
needs nothing but torch, diffusers and transformers:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("user/model", trust_remote_code=True)
    image = pipe("a red apple").images[0]
"""

import inspect
import json
import os
import shutil

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def predict_x0(output, x_t, alpha, sigma, prediction_type):
    """The network's estimate x̂0 of the clean latents, in float32.

    Args:
        output, x_t (`torch.Tensor`, (B, C, H, W)): what the network returned, and what it was given.
        alpha, sigma (`torch.Tensor`, broadcastable to x_t): x_t = alpha x0 + sigma eps.
        prediction_type (`str`): "epsilon", "sample" or "v_prediction", as in diffusers' scheduler configs.

    Raises:
        ValueError: for another prediction type.
    """
    output, x_t = output.float(), x_t.float()
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    raise ValueError(f"prediction_type `{prediction_type}` is not one of epsilon, sample, v_prediction")


class PixArtAlpha:
    """PixArt-α: a transformer with learned sigma that attends to T5's states, under their mask."""

    # What c consists of, and the arguments of the pipeline that give it.
    conditions = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        prompt, length = [p.lower().strip() for p in prompt], pipe.config.max_sequence_length
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(pipe.text_encoder.device)
        embeds = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": tokens.attention_mask}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        micro = {"resolution": None, "aspect_ratio": None}
        if pipe.denoiser.config.sample_size == 128:  # PixArt-α at 1024 pixels is also conditioned on the size
            height, width = (n * pipe.vae_scale_factor for n in x_t.shape[-2:])
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


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet that attends to all of CLIP's states, without a mask."""

    conditions = {"encoder_hidden_states": "prompt_embeds"}

    @staticmethod
    def encode_prompt(pipe, prompt):
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        return {"encoder_hidden_states": pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        return network(x_t, t, encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype), return_dict=False)[0]


class StableDiffusionXL:
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
            output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": output.text_embeds}

    @staticmethod
    def denoise(pipe, network, x_t, t, c):
        height, width = (n * pipe.vae_scale_factor for n in x_t.shape[-2:])
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x_t.device)
        return network(
            x_t,
            t,
            encoder_hidden_states=c["encoder_hidden_states"].to(x_t.dtype),
            added_cond_kwargs={"text_embeds": c["text_embeds"].to(x_t.dtype), "time_ids": size.repeat(len(x_t), 1)},
            return_dict=False,
        )[0]


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
        tokenizer_2, text_encoder_2: SDXL's second CLIP.
        vae ([`AutoencoderKL`]): decodes latents to pixels.
        transformer ([`PixArtTransformer2DModel`]), unet ([`UNet2DConditionModel`]): the generator, one of the two.
        scheduler ([`DDPMScheduler`]): holds the noise schedule and the prediction type; it is not stepped here.
        timestep (`int` or `list[int]`): t*, the timestep at which the generator was trained; or n descending ones.
        max_sequence_length (`int`, defaults to 120): T5's prompts are cut to this number of tokens.

    Raises:
        ValueError: if t* is missing or lies outside the schedule, several do not descend, or not just one network is
            given.
    """

    _optional_components = ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "transformer", "unet"]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->unet->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_2: PreTrainedModel,
        vae: AutoencoderKL,
        transformer: PixArtTransformer2DModel,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        timestep: int | list[int] = None,
        max_sequence_length: int = 120,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            raise ValueError("OneStepPipeline needs either a `transformer` or a `unet`")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            vae=vae,
            transformer=transformer,
            unet=unet,
            scheduler=scheduler,
        )
        self.register_to_config(timestep=timestep, max_sequence_length=max_sequence_length)
        last = scheduler.config.num_train_timesteps - 1
        self.timesteps = list(timestep) if isinstance(timestep, (list, tuple)) else [timestep]
        if not self.timesteps or not all(t is not None and 0 <= t <= last for t in self.timesteps):
            raise ValueError(f"OneStepPipeline needs the generator's timestep t* in 0..{last}, but got {timestep}")
        if any(later >= t for t, later in zip(self.timesteps, self.timesteps[1:])):
            raise ValueError(f"the timesteps of OneStepPipeline must descend, but are {timestep}")
        if transformer is not None:
            self.family = PixArtAlpha
        else:
            self.family = StableDiffusionXL if unet.config.addition_embed_type == "text_time" else StableDiffusion
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def denoiser(self):
        """The generator's network: the transformer or the UNet."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def sample_size(self):
        """Height and width, in pixels, of the images that the generator was trained for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    def latent_shape(self, height=None, width=None):
        """(C, H / f, W / f) of the latents of one image.

        Raises:
            ValueError: if the VAE's downsampling, times the transformer's patch, does not divide height and width.
        """
        height, width = height or self.sample_size, width or self.sample_size
        multiple = self.vae_scale_factor * (1 if self.transformer is None else self.transformer.config.patch_size)
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, but are {height} and {width}")
        return self.denoiser.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def encode_prompt(self, prompt):
        """The conditioning c of a list of B prompts: keyword arguments of `denoise`, each with B rows.

        Returns:
            `dict`: `encoder_hidden_states` (B, L, D); PixArt-α: `encoder_attention_mask` (B, L), L =
            `max_sequence_length`; SDXL: `text_embeds` (B, D_pooled).
        """
        return self.family.encode_prompt(self, prompt)

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

    def alpha_sigma(self, t):
        """α_t and σ_t, each (B, 1, 1, 1), of timesteps t (B,)."""
        alphas_cumprod = self.scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def estimate(self, network, x_t, t, c):
        """x̂0 (B, C, H, W), float32, of one evaluation; the arguments are those of `denoise`."""
        output = self.denoise(network, x_t, t, c)
        return predict_x0(output, x_t, *self.alpha_sigma(t), self.scheduler.config.prediction_type)

    def generate(self, network, z, c, noise=(), step=None):
        """g_θ(z, c): latents x0 (B, C, H, W), float32, from unit noise z. Training and inference both call this.

        Of several steps only the one that gives a sample's x0 has a gradient.

        Args:
            network: as in `denoise`.
            z (`torch.Tensor`, (B, C, H, W)): unit noise, x_t of the first timestep.
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
        for i in range(1, len(self.timesteps)):  # a sample that has reached its step stays where it is
            with torch.no_grad():
                x0 = self.estimate(network, x_t, t, c)
            t = torch.where(step >= i, self.timesteps[i], t)
            alpha, sigma = self.alpha_sigma(t)
            x_t = torch.where((step >= i).view(-1, 1, 1, 1), alpha * x0 + sigma * noise[i - 1], x_t)
        return self.estimate(network, x_t, t, c)

    def decode(self, x0):
        """Pixels (B, 3, H, W), float32, nominally in [0, 1] but not clamped, of latents x0; differentiable."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # SDXL's overflows in half precision
        latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5

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
                prompt_attention_mask ((B, L)) for PixArt-α, or pooled_prompt_embeds ((B, D)) for SDXL.
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
        shape = (len(c["encoder_hidden_states"]), *shape)

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
