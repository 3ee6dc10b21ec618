"""A Space: the page, an app that shows it, and the model beside them."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from accelerate import init_empty_weights

from diff_instruct.export import page
from diff_instruct.export.stock import rename_clip
from diff_instruct.files import NEW, PARTIAL, whole_folder
from diff_instruct.mistake import Mistake


IMPORTED = "GGUFQuantizationConfig"
GRADIO = "6.31.0"  # with which the page is tested
APP = '''\
"""Draws with the one-step generator in {where}."""

{imports}import torch
from diffusers import {classes}

import page


torch.set_grad_enabled(False)
{network}pipe = DiffusionPipeline.from_pretrained({source}, trust_remote_code=True{dtype}{given}).to("{device}")
pipe.set_progress_bar_config(disable=True)


{decorator}def draw(prompt, z, generators):
    """Pixels (n, 3, H, W) in [0, 1]."""
    given = {{"latents": z.to(pipe.dtype), "generator": generators, "output_type": "latent"}}
    return pipe.decode(pipe([prompt] * len(z), **given).images).clamp(0, 1)


model = page.Model({name}, draw, pipe.latent_shape())
content = page.Content({title}, {text}, {examples})

if __name__ == "__main__":
    page.launch(page.build(model, content))
'''
NETWORK = """\
rounded = GGUFQuantizationConfig(compute_dtype=torch.{dtype})
where = {{"config": str(page.HERE / "model"), "subfolder": "transformer", "torch_dtype": torch.{dtype}}}
file = str(page.HERE / "model" / "network.gguf")
network = {cls}.from_single_file(file, quantization_config=rounded, **where)
"""
CARD = """\
---
title: {title}
emoji: 🖼️
colorFrom: yellow
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
pinned: false
short_description: {short}
suggested_hardware: {hardware}
{extra}---

# {title}

{text}
"""


def check_folder(folder):
    """Raises Mistake if a Space would be written over what is none, such as a project with its own README.md."""
    app, folder = Path(folder) / "app.py", Path(folder)
    begun = any((folder / name).exists() for name in (NEW, PARTIAL))
    if not (begun or app.is_file() and app.read_text().startswith(APP.partition("{")[0])):
        for name in ("app.py", "page.py", "README.md", "requirements.txt", "model"):
            if (folder / name).exists():
                raise Mistake(
                    f"--export_space {folder} holds {name}, which is of no Space of ours: take another folder"
                )


def write_space(folder, title, text, examples, pipe=None, hub_model=None, zero_gpu=False, license=None, gguf=None):
    """Write the Space to a folder, whole or not at all.

    Args:
        pipe ([`OneStepPipeline`], *optional*): written to `model/` in the Space; or
        hub_model (*optional*): the model's id on the Hub, which the Space loads.
        zero_gpu: for ZeroGPU hardware: half precision, and a GPU for the time of a call; else it runs on the CPU.
        gguf (*optional*): the GGUF file that `pipe`'s transformer was read from, which the Space reads, too.
    """
    network, cls = "", None
    if gguf is not None:
        cls = type(pipe.transformer).__name__
        network = NETWORK.format(cls=cls, dtype="float16" if zero_gpu else "float32")
    hardware = "zero-a10g" if zero_gpu else "cpu-basic"
    extra = f"license: {license}\n" if license else ""
    if hub_model is not None:
        extra += f"models:\n- {hub_model}\npreload_from_hub:\n- {hub_model}\n"
    app = APP.format(
        where="model/" if hub_model is None else hub_model,
        source=repr(hub_model) if hub_model else 'str(page.HERE / "model")',
        imports="import spaces\n" if zero_gpu else "",
        classes=", ".join(["DiffusionPipeline"] if gguf is None else sorted(["DiffusionPipeline", IMPORTED, cls])),
        network=network,
        given="" if gguf is None else ", transformer=network",
        decorator="@spaces.GPU(duration=15)\n" if zero_gpu else "",
        dtype=", dtype=torch.float16" if zero_gpu else "",
        device="cuda" if zero_gpu else "cpu",
        name=repr(title),
        title=repr(title),
        text=repr(text),
        examples=repr(list(examples)),
    )
    packages = ["torch", "diffusers", "transformers", "accelerate", "safetensors"]
    packages += [] if gguf is None else ["gguf"]
    needs = [f"{name}=={version(name).partition('+')[0]}" for name in packages] + ["sentencepiece", "protobuf"]
    head = {"title": json.dumps(title), "text": text, "gradio": GRADIO, "hardware": hardware}
    card = CARD.format(**head, extra=extra, short="A one-step text-to-image generator")
    with whole_folder(folder) as aside:
        if gguf is not None:
            config = {k: v for k, v in pipe.transformer.config.items() if k != "quantization_config"}
            with init_empty_weights():
                type(pipe.transformer).from_config(config).save_config(aside / "model" / "transformer")
            shutil.copyfile(gguf, aside / "model" / "network.gguf")
            pipe.register_modules(transformer=None)
        if hub_model is None:
            pipe.save_pretrained(aside / "model")
            rename_clip(pipe.components, aside / "model")
        shutil.copyfile(page.__file__, aside / "page.py")
        (aside / "app.py").write_text(app)
        (aside / "requirements.txt").write_text("\n".join([*needs, *(["spaces"] if zero_gpu else [])]) + "\n")
        (aside / "README.md").write_text(card.replace(f"# {json.dumps(title)}", f"# {title}"))
