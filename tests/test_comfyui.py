"""Exports drawn by ComfyUI itself: its own server, validation, executor and samplers, on a CPU.

`COMFYUI=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python -m pytest -m apps tests/test_comfyui.py -s`, with a
ComfyUI that has the node `ManualSigmas` (0.7.0 or later); with `COMFYUI_GGUF=/path/to/ComfyUI-GGUF` GGUF files, too.
Nothing is fetched. The networks are small. Where its detection takes a family's widths from the file they are those of
the file; where it knows one width only, a node of the test's own says the small one to it. Text encoders have one
width there, so another node gives the encoded prompt, and one keeps the latents, which the export's VAE decodes.
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
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import export_for_apps
from diff_instruct.export.apps import App, own_layout, workflow
from diff_instruct.export.card import LORA_WEIGHTS
from diff_instruct.export.export import save_lora
from diff_instruct.export.kohya import folded_lora, original_lora
from diff_instruct.export.original import original_layout
from diff_instruct.export.rounded import write_bfloat16, write_fp8, write_gguf
from diff_instruct.families import FAMILIES
from diff_instruct.models.lora import add_lora, merged
from pipeline_one_step import Grid, OneStepPipeline
from tests.families.parts import randomised, vae_of
from tests.whole import stable_diffusion


pytestmark = pytest.mark.apps
GGUF = os.environ.get("COMFYUI_GGUF")
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


READ_AS_GGUF = ("flux", "sd3", "aura", "hyvid", "lumina2", "qwen_image")  # by ComfyUI-GGUF
SIZES = """
import comfy.supported_models

for name, (told, own) in SIZES.items():  # what detection tells the class by, and what it makes of the network
    cls = getattr(comfy.supported_models, name)
    cls.unet_config, cls.unet_extra_config = {**cls.unet_config, **told}, {**cls.unet_extra_config, **own}
"""


@dataclass(frozen=True)
class Small:
    """A network that is small to compute.

    Args:
        network: diffusers' class, and its options.
        text: width of the text encoder's states; pooled: of its pooled state.
        latents: ComfyUI's latents x are x0 / scale + shift here, or "qwen".
        tokens: of the prompt.
        side: in pixels.
        lora: deviation of the LoRA's weights.
        sizes: class in ComfyUI's `supported_models` to what it is told and what it makes of the network.
    """

    network: str
    options: dict
    text: int
    pooled: int | None = None
    latents: tuple | str = (1, 0)
    channels: int = 16
    tokens: int = 32
    side: int = 128
    factor: int = 8
    lora: float = 0.05
    sizes: dict = field(default_factory=dict)


def heads(n=2, layers=2, **options):
    return {"attention_head_dim": 128, "num_attention_heads": n, "num_layers": layers, **options}


FLUX, SDXL, SD = (0.3611, 0.1159), (0.13025, 0), (0.18215, 0)
FLUX2 = {"tokens": 512, "side": 256, "factor": 16, "channels": 128}
PIXART = {
    "attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 1, "cross_attention_dim": 1152,
    "sample_size": 64, "caption_channels": 4096, "in_channels": 4, "out_channels": 8, "norm_type": "ada_norm_single",
}  # fmt: skip
SMALL = {
    "FluxPipeline": Small(
        "FluxTransformer2DModel", heads(
            num_single_layers=2, in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768,
            axes_dims_rope=(16, 56, 56), guidance_embeds=True,
        ), 4096, 768, FLUX),
    "StableDiffusion3Pipeline": Small(
        "SD3Transformer2DModel", {
            "sample_size": 32, "in_channels": 16, "out_channels": 16, "num_layers": 4, "attention_head_dim": 64,
            "num_attention_heads": 4, "joint_attention_dim": 4096, "caption_projection_dim": 256,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 96, "qk_norm": "rms_norm",
        }, 4096, 2048, (1.5305, 0.0609)),
    "Flux2KleinPipeline": Small(
        "Flux2Transformer2DModel", heads(
            num_single_layers=2, in_channels=128, joint_attention_dim=256, axes_dims_rope=(32, 32, 32, 32),
            guidance_embeds=False,
        ), 256, **FLUX2),
    "Flux2Pipeline": Small(
        "Flux2Transformer2DModel", heads(
            num_single_layers=2, in_channels=128, joint_attention_dim=384, axes_dims_rope=(32, 32, 32, 32),
            guidance_embeds=True,
        ), 384, **FLUX2),
    "QwenImagePipeline": Small(
        "QwenImageTransformer2DModel", heads(joint_attention_dim=256), 256, latents="qwen",
        sizes={"QwenImage": ({}, heads(joint_attention_dim=256))}),
    "Krea2Pipeline": Small(
        "Krea2Transformer2DModel", {
            "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 128,
            "intermediate_size": 1408, "text_hidden_dim": 128, "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1, "text_intermediate_size": 384,
        }, 12 * 128, latents="qwen", sizes={"Krea2": ({}, {"txtheads": 1, "txtkvheads": 1})}),
    "ZImagePipeline": Small(
        "ZImageTransformer2DModel", {"dim": 1152, "n_layers": 1, "n_heads": 9, "n_kv_heads": 9, "cap_feat_dim": 64},
        64, latents=FLUX, sizes={"ZImage": ({"dim": 1152}, {
            "n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        })}),
    "Lumina2Pipeline": Small(
        "Lumina2Transformer2DModel", {
            "hidden_size": 192, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "cap_feat_dim": 64,
        }, 64, latents=FLUX, sizes={"Lumina2": ({"dim": 192}, {
            "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
        })}),
    "ChromaPipeline": Small(  # it counts modulations of 19 and 38 blocks
        "ChromaTransformer2DModel", heads(
            1, 19, num_single_layers=38, joint_attention_dim=64, axes_dims_rope=(16, 56, 56),
            approximator_hidden_dim=64, in_channels=64,
        ), 64, latents=FLUX, sizes={"Chroma": ({}, {"out_dim": 128, "hidden_dim": 64})}),
    "AuraFlowPipeline": Small(
        "AuraFlowTransformer2DModel", {
            "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 256, "num_attention_heads": 2,
            "caption_projection_dim": 512, "joint_attention_dim": 64, "pos_embed_max_size": 1024,
        }, 64, latents=SDXL, channels=4,
        sizes={"AuraFlow": ({"cond_seq_dim": 64}, {"dim": 512, "n_heads": 2, "global_conddim": 512})}),
    "OvisImagePipeline": Small(
        "OvisImageTransformer2DModel", heads(
            num_single_layers=2, in_channels=64, joint_attention_dim=64, axes_dims_rope=(16, 56, 56),
        ), 64, latents=FLUX),
    "LongCatImagePipeline": Small(
        "LongCatImageTransformer2DModel", heads(
            num_single_layers=2, in_channels=64, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56),
        ), 3584, latents=FLUX, tokens=512),
    "HunyuanImagePipeline": Small(
        "HunyuanImageTransformer2DModel", heads(
            num_single_layers=2, in_channels=64, text_embed_dim=64, text_embed_2_dim=1472, rope_axes_dim=(64, 64),
        ), 64, latents=(0.75289, 0), channels=64, side=256, factor=32),
    "ErnieImagePipeline": Small(
        "ErnieImageTransformer2DModel", {
            "hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 64,
        }, 64, **{**FLUX2, "tokens": 32, "lora": 0.3}, sizes={"ErnieImage": ({}, {
            "hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 64,
        })}),
    "PixArtAlphaPipeline": Small("PixArtTransformer2DModel", PIXART, 4096, latents=SD, channels=4, side=512),
    "PixArtSigmaPipeline": Small("PixArtTransformer2DModel", PIXART, 4096, latents=SDXL, channels=4, side=512),
}  # fmt: skip
if WHERE is None:
    pytest.skip("COMFYUI names no folder of ComfyUI", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, base directory) of ComfyUI, which runs while the module's tests do."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "models/diffusion_models", "models/loras", "input", "output", "user"):
        (base / folder).mkdir(parents=True)
    sizes = {name: sizes for small in SMALL.values() for name, sizes in small.sizes.items()}
    (base / "custom_nodes" / "given.py").write_text(f"SIZES = {sizes!r}\n{SIZES}\n{NODES}")
    if GGUF is not None:
        (base / "custom_nodes" / "ComfyUI-GGUF").symlink_to(GGUF)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--cpu",
        "--fp32-unet",
        "--fp32-vae",
        "--fp32-text-enc",
        "--disable-api-nodes",
        "--disable-auto-launch",
        "--listen",
        "127.0.0.1",
    ]
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


def finished(address, graph):
    """What ComfyUI says of a workflow when it has run."""
    number = ask(address, "/prompt", {"prompt": graph})["prompt_id"]
    while True:
        history = ask(address, f"/history/{number}")
        if number in history:
            return history[number]["status"]
        time.sleep(0.5)


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
    status = finished(address, graph)
    assert status["status_str"] == "success", [m[1].get("exception_message") for m in status["messages"]]
    return load_file(kept)["latents"]


def small_network(small):
    """A network with random weights, in bfloat16, whose layers keep their inputs' size."""
    torch.manual_seed(0)
    network = getattr(diffusers, small.network)(**small.options).eval().to(torch.bfloat16)
    for key, p in network.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        torch.nn.init.normal_(p, mean=1.0 if key.endswith("weight") and p.ndim == 1 else 0.0, std=scale)
    return network


def conditions(name, small):
    """(what `OneStepPipeline` is given, what ComfyUI's node is) of one prompt."""
    random = torch.Generator().manual_seed(1)
    states = torch.randn(1, small.tokens, small.text, generator=random)
    c, given = {"encoder_hidden_states": states}, {"states": states}
    if name == "Krea2Pipeline":
        c["encoder_hidden_states"] = states.unflatten(2, (12, -1))
    if small.pooled:
        c["pooled_projections"] = given["pooled_output"] = torch.randn(1, small.pooled, generator=random)
    if name == "HunyuanImagePipeline":
        c["encoder_hidden_states_2"] = given["conditioning_byt5small"] = torch.randn(1, 24, 1472, generator=random)
        c["encoder_attention_mask_2"] = torch.ones(1, 24, dtype=torch.int64)
    if "encoder_attention_mask" in FAMILIES[name].conditions:
        c["encoder_attention_mask"] = torch.ones(1, small.tokens, dtype=torch.int64)
    return c, given


def with_loader(graph, kind, **inputs):
    """The workflow with another loader of the network, or other inputs of it."""
    graph = json.loads(json.dumps(graph))
    number = next(number for number, node in graph.items() if node["class_type"] == "UNETLoader")
    graph[number] = {"class_type": kind, "inputs": inputs}
    return graph


@pytest.mark.parametrize("name", SMALL)
def test_comfyui_draws_the_export(server, name, tmp_path):
    """The network in bfloat16 and with a LoRA file, alpha three times its rank: within 2 of 255 of `OneStepPipeline`;
    rounded, near it."""
    small = SMALL[name]
    network, family, (c, given), (_, base) = small_network(small), FAMILIES[name], conditions(name, small), server
    torch.manual_seed(2)
    packed = small.factor == 16  # the network's channels are 2×2 patches of the VAE's
    vae = randomised(vae_of(small.channels // (4 if packed else 1), 8, scaling_factor=1.0, shift_factor=0.0), 0.2)
    betas = FAMILIES[name].apps.get("betas")
    scheduler = FlowMatchEulerDiscreteScheduler()
    if betas:
        scheduler = DDPMScheduler(beta_schedule=betas[0], beta_start=betas[1], beta_end=betas[2], clip_sample=False)
    parts = dict.fromkeys([*OneStepPipeline._optional_components, "vae"])
    pipe = OneStepPipeline(
        **{**parts, "transformer": network}, scheduler=scheduler, timestep=family.timestep, family=name
    )
    pipe.grid = Grid(small.channels, small.factor, 2 * small.factor, small.side)
    files = base / "models" / "diffusion_models"
    layout = original_layout(network, family.apps.get("original"))
    if family.apps.get("original") is None:
        save_file(own_layout(network, App(**family.apps)), files / f"{name}_transformer.safetensors")
    else:
        write_bfloat16(files / f"{name}_transformer.safetensors", layout)
    graph = workflow(pipe, name, "fire", seed=5)
    z = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(5))
    network.float()

    def ours(pipe):
        with torch.no_grad():
            return pipe.generate(pipe.transformer, z, c)

    def for_vae(x0):
        """As the pipeline's `decode` and ComfyUI's latent format have it: the published VAE's scale and shift."""
        if small.latents == "qwen":
            config = inspect.signature(diffusers.AutoencoderKLQwenImage.__init__).parameters
            mean, std = (torch.tensor(config[f"latents_{k}"].default).view(1, -1, 1, 1) for k in ("mean", "std"))
            return x0 * std + mean
        scale, shift = small.latents
        return x0 / scale + shift

    def picture(latents, std):
        latents = latents.float().view(1, *pipe.latent_shape()) / std
        if packed:
            latents = latents.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
        with torch.no_grad():
            return vae.decode(latents).sample

    def difference(graph, pipe):
        """Largest and mean difference of pictures in 255ths of the range of ours; and relative."""
        theirs, expected = run(server, graph, given), for_vae(ours(pipe))
        assert theirs.numel() == expected.numel()
        theirs = theirs.float().view(expected.shape)
        relative = ((theirs - expected).norm() / expected.norm()).item()
        a, b = (picture(latents, expected.std()) for latents in (theirs, expected))
        gap = (a - b).abs() * 255 / (b.max() - b.min())
        return gap.max().item(), gap.mean().item(), relative

    found = {"bfloat16": difference(graph, pipe)}
    if family.apps.get("original") is not None:
        write_fp8(files / f"{name}_fp8.safetensors", layout)
        loader = {"unet_name": f"{name}_fp8.safetensors", "weight_dtype": "default"}
        found["float8"] = difference(with_loader(graph, "UNETLoader", **loader), pipe)
    for kind in ("q8_0", "q4_0") if GGUF and family.apps.get("architecture") in READ_AS_GGUF else ():
        write_gguf(files / f"{name}_{kind}.gguf", layout, family.apps["architecture"], kind, family.modulation)
        loader = {"unet_name": f"{name}_{kind}.gguf"}
        found[kind] = difference(with_loader(graph, "UnetLoaderGGUF", **loader), pipe)
    if family.has_lora_files():
        adapted = add_lora(copy.deepcopy(network), "generator", 2, 6, family.lora_targets)
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=small.lora, generator=torch.Generator().manual_seed(len(key)))
        save_lora(tmp_path, family, adapted)
        state = folded_lora(tmp_path / LORA_WEIGHTS)
        if family.apps.get("original_lora"):
            state = original_lora(tmp_path / LORA_WEIGHTS, network, family.apps["original"])
        state = {k: v.bfloat16().contiguous() for k, v in state.items()}
        save_file(state, base / "models" / "loras" / f"{name}.safetensors")
        with_lora = json.loads(json.dumps(graph))
        number = next(number for number, node in graph.items() if node["class_type"] == "UNETLoader")
        inputs = {"model": [number, 0], "lora_name": f"{name}.safetensors", "strength_model": 1.0}
        with_lora["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        next(n for n in with_lora.values() if n["class_type"] == "SamplerCustom")["inputs"]["model"] = ["lora", 0]
        plain = for_vae(ours(pipe))
        network.load_state_dict({k: make() for k, make in merged(adapted, "generator").items()})
        found["LoRA"] = difference(with_lora, pipe)
        before, after = (picture(latents, plain.std()) for latents in (plain, for_vae(ours(pipe))))
        changed = (after - before).abs().max() * 255 / (before.max() - before.min())
        found["what the LoRA changes"] = changed.item()
    print(f"\n{name}: " + "; ".join(f"{k} {v}" for k, v in found.items()))
    assert found["bfloat16"][0] < 2
    assert all(
        found[kind][2] < most for kind, most in (("float8", 0.2), ("q8_0", 0.05), ("q4_0", 0.5)) if kind in found
    )
    if family.has_lora_files():
        assert found["LoRA"][0] < 2 and found["what the LoRA changes"] > 10


def test_stable_diffusion_at_full_size(server):
    """The whole file and the workflow as they are written, nothing replaced: 1.5's size, random weights, half
    precision; ComfyUI's own picture, within 2 of 255."""
    address, base = server
    tokenizer = CLIPTokenizer.from_pretrained(Path(WHERE) / "comfy" / "sd1_tokenizer", model_max_length=77)
    pipe = stable_diffusion(tokenizer, sizes=[[256, 256]])
    files = base / "models" / "checkpoints"
    export_for_apps.write(pipe, None, files, "apples", ["single_file", "workflow"], "a red apple")
    pipe.to(torch.float32)
    z = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    (other,), (ours,) = (
        pipe(prompt, latents=z, output_type="np").images for prompt in ("a blue whale", "a red apple")
    )
    del pipe
    graph = json.loads((files / "apples_workflow.json").read_text())
    status = finished(address, graph)
    assert status["status_str"] == "success", [m[1].get("exception_message") for m in status["messages"]]
    theirs = np.asarray(Image.open(base / "output" / "apples_00001_.png"))
    gap, prompts = (abs(255 * image - theirs) for image in (ours, other))
    print(f"\nStable Diffusion 1.5: {gap.max()}, {gap.mean()}; of another prompt {prompts.max()}, {prompts.mean()}; "
          f"deviation {theirs.std()}")  # fmt: skip
    assert gap.max() < 2 and prompts.max() > 10 and theirs.std() > 20
