# SPDX-License-Identifier: Apache-2.0
"""The page to play with a one-step generator: draws while one types, nine seeds, before and after.

This file travels to Spaces, so it needs nothing but torch, PIL and gradio.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from PIL import Image


HERE = Path(__file__).resolve().parent
SHOWN = 400  # pixels of a picture's side on the page
SEEDS = 9
TABS = ("One picture", "Nine seeds", "Before and after")
CSS = """
.gradio-container {max-width: 1000px !important; width: 100% !important; margin: auto}
.gradio-container main {width: 100%}
#head h1 {font-size: 1.7rem; margin: 0.2rem 0 0}
#head p {color: var(--body-text-color-subdued); margin: 0.2rem 0 0.4rem}
#prompt textarea {font-size: 1.25rem}
#nine .grid-wrap {max-height: none}
.figures {text-align: center; font-variant-numeric: tabular-nums; font-size: 1.05rem}
footer {display: none !important}
"""


@dataclass
class Model:
    """What the page draws with.

    Args:
        name: what the page calls it.
        draw: `draw(prompt, z, generators)` gives pixels (n, 3, H, W) in [0, 1] from unit noise z (n, C, H/f, W/f); the
            generators, one an image, give noise that is wanted later.
        latent_shape: (C, H/f, W/f).
    """

    name: str
    draw: Callable
    latent_shape: tuple


@dataclass
class Content:
    """What the page shows beside the model's own pictures.

    Args:
        title, text (Markdown), examples (prompts).
        before ([`Model`], *optional*): draws the left half of the slider.
        score (*optional*): `score(pixels, prompts)` gives a `dict` of names and lists of scores.
        gallery: (file, caption) of pictures that exist already.
        table: Markdown above the gallery.
    """

    title: str
    text: str = ""
    examples: list = field(default_factory=list)
    before: Model | None = None
    score: Callable | None = None
    gallery: list = field(default_factory=list)
    table: str = ""


def noise(shape, seeds):
    """(z (n, C, H, W), generators): the same for a seed whatever else is drawn with it."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


def to_pil(pixels):
    """PIL images of pixels (n, 3, H, W) in [0, 1], small ones enlarged for the page."""
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(array) for array in arrays]
    scale = max(1, -(-SHOWN // images[0].width))
    return [image.resize((image.width * scale, image.height * scale), Image.LANCZOS) for image in images]


def figures(score, pixels, prompt, milliseconds=None):
    """A line for each picture: its scores, and behind the first one's the time."""
    lines = [[] for _ in pixels]
    if score is not None:
        for name, values in score(pixels, [prompt] * len(pixels)).items():
            for line, value in zip(lines, values):
                line.append(f"{name} {value:.2f}")
    if milliseconds is not None:
        lines[0].append(f"{milliseconds:.0f} ms")
    return [" · ".join(line) for line in lines]


def pictures(model, prompt, seeds):
    """(pixels, milliseconds an image) of one prompt."""
    started = time.perf_counter()
    pixels = model.draw(prompt, *noise(model.latent_shape, seeds)).float()
    return pixels, 1000 * (time.perf_counter() - started) / len(pixels)


def one(model, score, prompt, seed):
    """(image, its figures)."""
    pixels, ms = pictures(model, prompt, [seed])
    return to_pil(pixels)[0], figures(score, pixels, prompt, ms)[0]


def nine(model, score, prompt, seed):
    """((image, figures) of nine seeds, the time)."""
    pixels, ms = pictures(model, prompt, range(int(seed), int(seed) + SEEDS))
    scores = score(pixels, [prompt] * len(pixels)) if score is not None else {}
    captions = [" · ".join(f"{value:.2f}" for value in row) for row in zip(*scores.values())] or [None] * SEEDS
    line = f"seeds {int(seed)} to {int(seed) + SEEDS - 1} · {ms:.0f} ms each"
    return list(zip(to_pil(pixels), captions)), " · ".join([line, *scores])


def pair(before, after, score, prompt, seed):
    """((image before, image after), their figures): the same noise, where the latents have the same shape."""
    drawn = [pictures(model, prompt, [seed]) for model in (before, after)]
    lines = [figures(score, pixels, prompt, ms)[0] for pixels, ms in drawn]
    left, right = (to_pil(pixels)[0] for pixels, _ in drawn)
    if left.size != right.size:
        left = left.resize(right.size, Image.LANCZOS)
    return (left, right), f"**{before.name}** {lines[0]} &emsp; **{after.name}** {lines[1]}"


def redraw(model, content, tab, prompt, seed):
    """What each of the page's six outputs shows now; None where nothing is to be done: the tab is not open."""
    with torch.no_grad():
        if tab == TABS[0]:
            return *one(model, content.score, prompt, seed), None, None, None, None
        if tab == TABS[1]:
            return None, None, *nine(model, content.score, prompt, seed), None, None
        return None, None, None, None, *pair(content.before, model, content.score, prompt, seed)


def build(model, content):
    """The page, a `gradio.Blocks`; launch it with `css=CSS` and a theme."""
    import gradio as gr

    def update(tab, prompt, seed):
        return [gr.skip() if value is None else value for value in redraw(model, content, tab, prompt, seed)]

    first = content.examples[0] if content.examples else "a red apple"
    image, line, *_ = redraw(model, content, TABS[0], first, 0)
    with gr.Blocks(title=content.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {content.title}\n{content.text}", elem_id="head")
        tab = gr.State(TABS[0])
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(first, label="Prompt", lines=1, scale=5, elem_id="prompt", autofocus=True)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=1, min_width=90, elem_id="seed")
            another = gr.Button("Another seed", scale=1, min_width=130, variant="primary", elem_id="another")
        if len(content.examples) > 1:
            gr.Examples(content.examples, inputs=prompt, label="Try")
        with gr.Tab(TABS[0]) as tab_one:
            figures_one = gr.Markdown(line, elem_classes="figures", elem_id="figures")
            shown = gr.Image(image, show_label=False, height=SHOWN, elem_id="picture", buttons=["download"])
        with gr.Tab(TABS[1]) as tab_nine:
            figures_nine = gr.Markdown(elem_classes="figures")
            grid = gr.Gallery(columns=3, show_label=False, height="100%", object_fit="contain", elem_id="nine")
        with gr.Tab(TABS[2], visible=content.before is not None) as tab_pair:
            figures_pair = gr.Markdown(elem_classes="figures")
            slider = gr.ImageSlider(show_label=False, height=SHOWN, elem_id="pair", type="pil", interactive=False)
        if content.gallery or content.table:
            with gr.Tab("Gallery"):
                if content.table:
                    gr.Markdown(content.table)
                if content.gallery:
                    gr.Gallery(content.gallery, columns=4, show_label=False, height="auto", object_fit="contain")
        inputs, outputs = [tab, prompt, seed], [shown, figures_one, grid, figures_nine, slider, figures_pair]
        live = {"show_progress": "hidden", "trigger_mode": "always_last", "concurrency_limit": 1, "queue": True}
        gr.on([prompt.change, seed.change], update, inputs, outputs, **live)
        another.click(lambda n: int(n) + SEEDS, seed, seed, show_progress="hidden")
        for name, opened in zip(TABS, (tab_one, tab_nine, tab_pair)):
            opened.select(lambda name=name: name, None, tab).then(update, inputs, outputs, **live)
    return page


def launch(page, **options):
    """Show the page; the options are those of `gradio.Blocks.launch`."""
    import gradio as gr

    theme = gr.themes.Soft(primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"])
    return page.launch(theme=theme, css=CSS, **options)
