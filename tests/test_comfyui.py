"""Exports drawn by ComfyUI itself: its own server, validation, executor and samplers, on a CPU.

`COMFYUI=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python -m pytest -m apps tests/test_comfyui.py`, with a
ComfyUI that has the node `ManualSigmas` (0.7.0 or later). Nothing is fetched. The networks are small, in widths that
its detection takes; text encoders have one width only there, so a node of the test's own gives the encoded prompt, and
another keeps the latents, which the export's VAE decodes.
"""

import copy
import inspect
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diff_instruct.export.apps import workflow
from diff_instruct.export.card import LORA_WEIGHTS
from diff_instruct.export.export import save_lora
from diff_instruct.export.kohya import folded_lora
from diff_instruct.export.original import original_layout
from diff_instruct.export.rounded import write_bfloat16, write_fp8
from diff_instruct.families import FAMILIES
from diff_instruct.models.lora import add_lora, merged
from pipeline_one_step import Grid, OneStepPipeline
from tests.families.parts import randomised, vae_of


pytestmark = pytest.mark.apps
WHERE, PYTHON = os.environ.get("COMFYUI"), os.environ.get("COMFYUI_PYTHON", "python")
NODES = """
from safetensors.torch import load_file, save_file


class Given:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def run(self, file):
        state = load_file(file)
        return ([[state.pop("states"), state]],)


class Keep:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "file": ("STRING", {})}}

    def run(self, samples, file):
        save_file({"latents": samples["samples"].contiguous()}, file)
        return {}


NODE_CLASS_MAPPINGS = {"Given": Given, "Keep": Keep}
"""


def flux(**options):
    return {"attention_head_dim": 128, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, **options}


SMALL = {  # of the widths that ComfyUI's detection knows
    "FluxPipeline": ("FluxTransformer2DModel", 16, flux(
        in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56),
        guidance_embeds=True)),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", 16, {
        "sample_size": 32, "in_channels": 16, "out_channels": 16, "num_layers": 4, "attention_head_dim": 64,
        "num_attention_heads": 4, "joint_attention_dim": 4096, "caption_projection_dim": 256,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 96, "qk_norm": "rms_norm"}),
    "Flux2KleinPipeline": ("Flux2Transformer2DModel", 32, flux(
        in_channels=128, joint_attention_dim=256, axes_dims_rope=(32, 32, 32, 32), guidance_embeds=False)),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", 16, {"num_layers": 1}),
    "Krea2Pipeline": ("Krea2Transformer2DModel", 16, {
        "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1408}),
    "ZImagePipeline": ("ZImageTransformer2DModel", 16, {"n_layers": 2}),
}  # fmt: skip
TEXT = {  # states, pooled
    "FluxPipeline": (4096, 768),
    "StableDiffusion3Pipeline": (4096, 2048),
    "Flux2KleinPipeline": (256, None),
    "QwenImagePipeline": (3584, None),
    "Krea2Pipeline": (12 * 2560, None),
    "ZImagePipeline": (2560, None),
}
SCALES = {
    "FluxPipeline": (0.3611, 0.1159),
    "StableDiffusion3Pipeline": (1.5305, 0.0609),
    "Flux2KleinPipeline": (1, 0),
    "ZImagePipeline": (0.3611, 0.1159),
}
if WHERE is None:
    pytest.skip("COMFYUI names no folder of ComfyUI", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, base directory) of ComfyUI, which runs while the module's tests do."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "models/diffusion_models", "models/loras", "input", "output", "user"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "given.py").write_text(NODES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--cpu", "--fp32-unet", "--disable-api-nodes", "--disable-auto-launch", "--listen", "127.0.0.1"]
    command = [PYTHON, "main.py", *options, "--port", str(port), "--base-directory", str(base)]
    log = (base / "log.txt").open("w")
    process = subprocess.Popen(command, cwd=WHERE, stdout=log, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.time() + 600
    while True:
        try:
            urllib.request.urlopen(f"{address}/system_stats").read()
            break
        except OSError:
            if process.poll() is not None or time.time() > deadline:
                pytest.fail(f"ComfyUI does not start:\n{(base / 'log.txt').read_text()[-3000:]}")
            time.sleep(1)
    yield address, base
    process.terminate()
    process.wait()


def ask(address, path, data=None):
    request = urllib.request.Request(address + path, data=None if data is None else json.dumps(data).encode())
    try:
        return json.loads(urllib.request.urlopen(request).read())
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())


def run(server, graph, given):
    """The latents of a workflow of ours, its text encoder, VAE and picture replaced by what the test gives."""
    address, base = server
    file = base / f"{time.time()}.safetensors"  # another name, or ComfyUI takes what it has read of the last
    save_file(given, file)
    graph, kept = json.loads(json.dumps(graph)), base / "latents.safetensors"
    for number, node in list(graph.items()):
        kind = node["class_type"]
        if kind.startswith("CLIPTextEncode"):
            graph[number] = {"class_type": "Given", "inputs": {"file": str(file)}}
        elif kind == "VAEDecode":
            inputs = {"samples": node["inputs"]["samples"], "file": str(kept)}
            graph[number] = {"class_type": "Keep", "inputs": inputs}
        elif kind in ("VAELoader", "SaveImage") or kind.endswith("CLIPLoader"):
            del graph[number]
    number = ask(address, "/prompt", {"prompt": graph})["prompt_id"]
    while True:
        history = ask(address, f"/history/{number}")
        if number in history:
            break
        time.sleep(0.5)
    status = history[number]["status"]
    assert status["status_str"] == "success", [m[1].get("exception_message") for m in status["messages"]]
    return load_file(kept)["latents"]


def small_network(name):
    """A network with random weights, in bfloat16, whose layers keep their inputs' size."""
    cls, _, options = SMALL[name]
    torch.manual_seed(0)
    network = getattr(diffusers, cls)(**options).eval().to(torch.bfloat16)
    for key, p in network.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        torch.nn.init.normal_(p, mean=1.0 if "norm" in key and p.ndim == 1 else 0.0, std=scale)
    return network


def conditions(name):
    """(what `OneStepPipeline` is given, what ComfyUI's node is) of one prompt of 512 tokens, as FLUX.2 pads to."""
    width, pooled = TEXT[name]
    random = torch.Generator().manual_seed(1)
    states = torch.randn(1, 512, width, generator=random)
    c, given = {"encoder_hidden_states": states}, {"states": states}
    if name == "Krea2Pipeline":
        c["encoder_hidden_states"] = states.unflatten(2, (12, 2560))
    if pooled:
        c["pooled_projections"] = given["pooled_output"] = torch.randn(1, pooled, generator=random)
    if "encoder_attention_mask" in FAMILIES[name].conditions:
        c["encoder_attention_mask"] = torch.ones(1, 512, dtype=torch.int64)
    return c, given


@pytest.mark.parametrize("name", SMALL)
def test_comfyui_draws_the_export(server, name, tmp_path):
    """The network in bfloat16 and with a LoRA file, alpha three times its rank: within 2 of 255 of `OneStepPipeline`;
    in float8 near it."""
    network, (_, channels, _) = small_network(name), SMALL[name]
    family, (c, given), (_, base) = FAMILIES[name], conditions(name), server
    torch.manual_seed(2)
    factor = 16 if name == "Flux2KleinPipeline" else 8
    vae = randomised(vae_of(channels, 8, scaling_factor=1.0, shift_factor=0.0), 0.2)
    parts = dict.fromkeys([*OneStepPipeline._optional_components, "vae"])

    def pipeline(network):
        pipe = OneStepPipeline(
            **{**parts, "transformer": network},
            scheduler=FlowMatchEulerDiscreteScheduler(),
            timestep=1000,
            family=name,
        )
        pipe.grid = Grid(network.config.in_channels if factor == 16 else channels, factor, 2 * factor, 256)
        return pipe

    pipe = pipeline(network)
    files = base / "models" / "diffusion_models"
    layout = original_layout(network, family.apps["original"])
    write_bfloat16(files / f"{name}_transformer.safetensors", layout)
    write_fp8(files / f"{name}_transformer_fp8.safetensors", layout)
    graph = workflow(pipe, name, "fire", seed=5)
    z = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(5))
    network.float()

    def ours(pipe):
        with torch.no_grad():
            return pipe.generate(pipe.transformer, z, c)

    def for_vae(x0):
        """As the pipeline's `decode` and ComfyUI's latent format have it: the published VAE's scale and shift."""
        if name in ("QwenImagePipeline", "Krea2Pipeline"):
            config = inspect.signature(diffusers.AutoencoderKLQwenImage.__init__).parameters
            mean, std = (torch.tensor(config[f"latents_{k}"].default).view(1, -1, 1, 1) for k in ("mean", "std"))
            return x0 * std + mean
        scale, shift = SCALES[name]
        return x0 / scale + shift

    def picture(latents):
        latents = latents.float().view(1, *pipe.latent_shape())
        if factor == 16:  # 2×2 patches of channels
            latents = (
                latents.view(1, channels, 2, 2, *latents.shape[2:]).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
            )
        with torch.no_grad():
            return vae.decode(latents / 4).sample

    def difference(graph, pipe):
        """Largest and mean difference of pictures in 255ths of the range of ours."""
        theirs, expected = run(server, graph, given), for_vae(ours(pipe))
        assert theirs.numel() == expected.numel()
        a, b = picture(theirs), picture(expected)
        gap = (a - b).abs() * 255 / (b.max() - b.min())
        return gap.max().item(), gap.mean().item(), ((a - b).norm() / b.norm()).item()

    found = {"bfloat16": difference(graph, pipe)}
    loader = next(node for node in graph.values() if node["class_type"] == "UNETLoader")
    rounded = json.loads(json.dumps(graph))
    next(n for n in rounded.values() if n["class_type"] == "UNETLoader")["inputs"]["unet_name"] = (
        f"{name}_transformer_fp8.safetensors"
    )
    found["float8"] = difference(rounded, pipe)

    adapted = add_lora(copy.deepcopy(network), "generator", 2, 6, family.lora_targets)
    for key, p in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    save_lora(tmp_path, family, adapted)
    state = folded_lora(tmp_path / LORA_WEIGHTS)
    save_file(
        {k: v.bfloat16().contiguous() for k, v in state.items()}, base / "models" / "loras" / f"{name}.safetensors"
    )
    with_lora = json.loads(json.dumps(graph))
    number = next(k for k, n in graph.items() if n is loader)
    inputs = {"model": [number, 0], "lora_name": f"{name}.safetensors", "strength_model": 1.0}
    with_lora["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    next(n for n in with_lora.values() if n["class_type"] == "SamplerCustom")["inputs"]["model"] = ["lora", 0]
    plain = ours(pipe)
    network.load_state_dict({k: make() for k, make in merged(adapted, "generator").items()})
    found["LoRA"] = difference(with_lora, pipe)
    plain = picture(for_vae(plain))
    changed = picture(for_vae(ours(pipe))) - plain
    found["what the LoRA changes"] = (changed.abs().max() * 255 / (plain.max() - plain.min())).item()
    print(f"\n{name}: " + "; ".join(f"{k} {v}" for k, v in found.items()))
    assert found["bfloat16"][0] < 2 and found["LoRA"][0] < 2 and found["float8"][2] < 0.2
    assert found["what the LoRA changes"] > 10
