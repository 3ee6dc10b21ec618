"""`--dry_run --memory_gib` for every family and every architecture that is shipped: a number, never a traceback."""

from pathlib import Path

import pytest

from diff_instruct.families import FAMILIES
from diff_instruct.models.sources import models_of
from diff_instruct.plan.activations import activations
from diff_instruct.plan.advice import advice
from diff_instruct.plan.memory_plan import GIB, peak
from diff_instruct.training.arguments import parse_args
from tests.families import SIDES, save


ARCHITECTURES = sorted(Path(__file__).resolve().parents[1].glob("benchmarks/architectures/*/model_index.json"))


# masks that are asked for lengths, chats, three tokenizers, quoted text, a processor; others behave as one of these
IN_SHORT = "Lumina2Pipeline ZImagePipeline StableDiffusion3Pipeline HunyuanImagePipeline QwenImage21Pipeline".split()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_SHORT else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_is_predicted(tiny_args, tmp_path, name):
    model = save(name, tmp_path / "model")
    words = ["--resolution", SIDES[name], "--cfg_scale", 1, "--lora_rank", 2, "--ta_lora_rank", 2]
    args = parse_args([*tiny_args, "--pretrained_model_name_or_path", model, *map(str, words)])
    models = models_of(args)
    phases = activations(args, models, "bf16")
    assert min(phases.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("index", ARCHITECTURES, ids=[index.parent.name for index in ARCHITECTURES])
def test_prediction(index):
    """The weights of the frozen network are in it, and what a step adds is more than nothing and less than 80 GiB."""
    words = (
        "--reward pocket --lora_rank 64 --ta_lora_rank 64 --gradient_checkpointing --train_batch_size 1 --cfg_scale 1"
    )
    words += " --use_8bit_adam --reward_batch_size 1 --offload_text_encoder --offload_ema --mixed_precision bf16"
    args = parse_args(
        ["--pretrained_model_name_or_path", str(index.parent), "--train_prompts", __file__, *words.split()]
    )
    models = models_of(args)
    phase, need = peak(args, models, "bf16")
    held = 2 * sum(p.numel() for p in models.networks[models.denoiser].parameters())
    print(f"{index.parent.name}: {need / GIB:.2f} GiB in the {phase}, {held / GIB:.2f} of it the frozen network")
    assert held < need < held + 80 * GIB
    assert "Predicted peak" in advice(args, models, 10_000) if need < 10 * GIB else True
