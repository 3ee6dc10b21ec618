"""Each flow-matching family on tiny networks of the real classes: training's forward, the export and the stock pipeline
agree; so do the guided reference and LoRA files. A new family passes these tests, see docs/families.md."""

import pytest
import torch

from diff_instruct.export.card import stock_call
from diff_instruct.models.families import FAMILIES
from diff_instruct.prompts.conditioning import Conditioning
from pipeline_one_step import pack, unpack
from tests.runs import load
from tests.tiny_flow import FLOW, SIDE, save_tiny_flow


PROMPTS = ["a red apple", "blue cat and the big dog", ""]
RENORMALISED = ("QwenImagePipeline",)  # by the stock pipeline, and that cannot be turned off
GUIDED = [name for name in FLOW if name not in ("SanaSprintPipeline", "schnell", *RENORMALISED)]
SIZE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name to the folder of its tiny pipeline, made when it is asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save_tiny_flow(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@pytest.fixture
def flow_args(tiny_args, models):
    """Arguments, as `tiny_args`, for a family."""

    def arguments(name, *options):
        words = [*tiny_args, "--pretrained_model_name_or_path", models(name), "--resolution", SIDE, "--cfg_scale", 1]
        return [str(w) for w in (*words, *options)]

    return arguments


def family_of(name):
    return FAMILIES[{"schnell": "FluxPipeline"}.get(name, name)]


def noise(pipe, n, seed=0):
    return torch.randn(n, *pipe.latent_shape(SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def stock_images(name, pipe, prompts, z, stock=None):
    """What the stock pipeline draws from z when it is called as the model card says."""
    family = family_of(name)
    scope, sigma = {"pipe": pipe}, pipe.timesteps[0] / pipe.schedule.steps
    if name == "SanaSprintPipeline":  # it rescales what it is given to its own convention
        z = z / (sigma**2 + (1 - sigma) ** 2) ** 0.5
    setup, _, call = stock_call(family, pipe, "PROMPTS").partition("image = stock(")
    exec(setup, scope)
    if stock is not None:
        stock.scheduler = scope["stock"].scheduler
        scope["stock"] = stock
    scope["stock"].set_progress_bar_config(disable=True)
    call = call.replace('"PROMPTS"', "list(prompts)").removesuffix(").images[0]").rstrip().rstrip(",")
    scope |= {"prompts": prompts, "latents": pack(z) if family.packed else z, "size": SIZE}
    torch.manual_seed(7)
    return eval(f"stock({call}, latents=latents, output_type='pt', **size).images", scope)


def seeded_noise(pipe, z):
    """The noise of the further steps as the stock's sampler draws it: from torch's own generator, of tokens in some."""
    torch.manual_seed(7)
    tokens = (len(z), z[0, 0].numel(), z.shape[1])
    if FAMILIES[pipe.config.family].packed:
        return [unpack(torch.randn(pack(z).shape), z.shape) for _ in pipe.timesteps[1:]]
    if pipe.config.family == "Flux2KleinPipeline":
        return [torch.randn(tokens).transpose(1, 2).reshape(z.shape) for _ in pipe.timesteps[1:]]
    return [torch.randn(z.shape) for _ in pipe.timesteps[1:]]


def ours(pipe, prompts, z):
    encode = Conditioning(pipe.encode_prompt, "cpu")
    with torch.no_grad():
        x0 = pipe.generate(pipe.denoiser, z, encode(prompts), seeded_noise(pipe, z))
        return pipe.decode(x0).clamp(0, 1)


@pytest.mark.parametrize("timesteps", [[1000], [700], [1000, 700, 300]])
@pytest.mark.parametrize("name", FLOW)
def test_equals_the_stock_pipeline(flow_args, record_property, name, timesteps):
    *_, pipe = load(flow_args(name, "--timestep", *timesteps))
    z = noise(pipe, len(PROMPTS))
    images = ours(pipe, PROMPTS, z)
    expected = stock_images(name, pipe, PROMPTS, z)
    record_property("max_abs_difference", (images - expected).abs().max().item())
    print(name, timesteps, (images - expected).abs().max().item(), images.std().item())
    assert images.std() > 0.03 and images.flatten(1).std(dim=1).min() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    alone = (
        torch.cat([ours(pipe, [p], z[i : i + 1]) for i, p in enumerate(PROMPTS)]) if len(timesteps) == 1 else images
    )
    torch.testing.assert_close(images, alone, atol=1e-5, rtol=0)
