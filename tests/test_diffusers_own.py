"""diffusers' own tests of pipelines, run on `OneStepPipeline` for a family of each kind.

They are in diffusers' repository, not in its package: those of a checkout run with
`DIFFUSERS_REPOSITORY=/path/to/diffusers python -m pytest -m apps tests/test_diffusers_own.py`.
"""

import importlib
import os
import sys

import pytest
import torch

from pipeline_one_step import OneStepPipeline
from tests.families import BUILD, FAMILY, SIDES


pytestmark = pytest.mark.apps
WHERE = os.environ.get("DIFFUSERS_REPOSITORY")
FAMILIES = [
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionXLPipeline",
    "ZImagePipeline",
]

if WHERE is None:
    pytest.skip("DIFFUSERS_REPOSITORY names no checkout of diffusers", allow_module_level=True)

ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "tests"}
sys.path.insert(0, WHERE)  # their package is called `tests`, too
own = importlib.import_module("tests.pipelines.testing_utils")
sys.path.remove(WHERE)
for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    sys.modules[f"their_{name}"] = sys.modules.pop(name)
sys.modules.update(ours)


class OneStepTests(own.BasePipelineTesterConfig, own.PipelineTesterMixin):
    pipeline_class = OneStepPipeline
    required_input_params_in_call_signature = frozenset(["prompt", "height", "width", "prompt_embeds"])
    batch_input_params = frozenset(["prompt"])
    name = None

    @property
    def output_shape(self):
        return 3, SIDES[self.name], SIDES[self.name]

    def get_dummy_components(self):
        torch.manual_seed(0)
        stock = BUILD[self.name]()
        parts = dict.fromkeys([*OneStepPipeline._optional_components, "vae", "scheduler"])
        parts |= {k: v for k, v in stock.components.items() if k in parts}
        return {**parts, "scheduler": FAMILY[self.name].scheduler(stock.scheduler)}

    def get_pipeline(self, **components):
        t = FAMILY[self.name].timestep
        return super().get_pipeline(
            **(components or self.get_dummy_components()), family=FAMILY[self.name].name, timestep=t
        )

    def get_dummy_inputs(self):
        size = {"height": SIDES[self.name], "width": SIDES[self.name]}
        steps = {"num_inference_steps": 1, "generator": self.get_generator(0)}
        return {"prompt": "a red apple", **size, **steps, "output_type": "pt"}

    # Guidance is that of the training, so another scale is an error.

    def test_cfg(self):
        with pytest.raises(ValueError, match="guidance_scale must be"):
            self.run_pipe(self.get_pipeline(), guidance_scale=7.5)

    @pytest.mark.skip("a generator has no guidance to change on the way")
    def test_callback_cfg(self):
        pass

    def test_save_load_optional_components(self, tmp_path):
        """As theirs, for the text parts: network and VAE may be None, too, and then nothing can be drawn."""
        pipe = self.get_pipeline()
        c, texts = pipe.encode_prompt("a red apple"), [n for n in pipe.components if "text" in n or "tokenizer" in n]
        for name in texts:
            setattr(pipe, name, None)
        before = self.run_pipe(pipe, prompt=None, prompt_embeds=c)
        pipe.save_pretrained(tmp_path, safe_serialization=False)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        assert all(getattr(loaded, name) is None for name in texts)
        torch.testing.assert_close(self.run_pipe(loaded, prompt=None, prompt_embeds=c), before, atol=1e-4, rtol=0)

    def test_encode_prompt_works_in_isolation(self):
        """As theirs, which reads from the source which names of a tuple are arguments of the call; `encode_prompt`
        gives the `dict` of what the family has, and the call takes it as it is."""
        parts = self.get_dummy_components()
        texts = {name for name in parts if "text" in name or "tokenizer" in name}
        text = self.get_pipeline(**{k: v if k in texts | {"scheduler"} else None for k, v in parts.items()})
        rest = self.get_pipeline(**{k: None if k in texts else v for k, v in parts.items()})
        drawn = self.run_pipe(rest, prompt=None, prompt_embeds=text.encode_prompt("a red apple"))
        torch.testing.assert_close(drawn, self.run_pipe(self.get_pipeline(**parts)), atol=1e-4, rtol=1e-4)


for family in FAMILIES:
    globals()[f"Test{family}"] = type(f"Test{family}", (OneStepTests,), {"name": family})
del OneStepTests
