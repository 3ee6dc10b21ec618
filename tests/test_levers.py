"""What saves memory or time changes no result beyond rounding (docs/performance.md lists these flags)."""

import pytest
import torch

from diff_instruct.training.arguments import parse_args
from diff_instruct.training.optimizer import make_optimizer
from tests.runs import run, trained, weights


LORA = ["--lora_rank", 2, "--ta_lora_rank", 2]


def largest_difference(a, b):
    """Of all weights, relative to the largest weight of its tensor."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in a)


def moved_by(quick_args, tmp_path, name, options):
    """What three steps of generator and TA end with."""
    folder = tmp_path / name
    run([*quick_args, "--adam_epsilon", 1e-3, "--max_train_steps", 3, "--checkpointing_steps", 3, *options,
         "--output_dir", folder])  # fmt: skip
    return trained(folder, 3), trained(folder, 3, "teaching_assistant"), weights(folder)


SAVING = ["--gradient_checkpointing", "--reward_batch_size", 1, "--offload_text_encoder"]


@pytest.mark.parametrize(
    "lever, base, tolerance",
    [
        (["--offload_ema", *SAVING], [], 1e-5),
        (["--gradient_checkpointing"], [*LORA, "--mixed_precision", "bf16"], 1e-6),
        *(
            pytest.param(lever, base, tolerance, marks=pytest.mark.slow)
            for lever, base, tolerance in (
                (["--offload_ema"], [], 0),
                (["--train_batch_size", 1, "--gradient_accumulation_steps", 2], [], 1e-5),
                (["--compile"], [], 1e-5),
                (["--compile", "--gradient_checkpointing"], LORA, 2e-5),
            )
        ),
    ],
)
def test_a_lever_changes_nothing_beyond_rounding(quick_args, tiny_model, tmp_path, lever, base, tolerance):
    with_it = moved_by(quick_args, tmp_path, "with", [*base, *lever])
    without = moved_by(quick_args, tmp_path, "without", base)
    assert largest_difference(without[-1], weights(tiny_model)) > 1e-4  # of the generator that was exported
    for a, b in zip(with_it, without):
        assert largest_difference(a, b) <= tolerance


def test_8bit_adam_takes_the_steps_of_adam():
    """20 steps along gradients that are half noise: within 2%, from a quarter of the state."""
    moved, start = [], torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    for flags in ([], ["--use_8bit_adam"]):
        p, rng = torch.nn.Parameter(start.clone()), torch.Generator().manual_seed(1)
        optimizer = make_optimizer(parse_args(flags), [p], 1e-3)
        for _ in range(20):
            p.grad = 1 + torch.randn(p.shape, generator=rng)
            optimizer.step()
        moved.append(p.detach() - start)
        state = {v.dtype for v in optimizer.state[p].values() if torch.is_tensor(v) and v.numel() == p.numel()}
        assert state == {torch.uint8 if flags else torch.float32}
    assert 0 < (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
