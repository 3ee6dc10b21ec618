#!/usr/bin/env bash
# On a CPU bitsandbytes decodes 4-bit weights wrongly if their rows are no whole number of blocks.
#
# Versions: torch 2.13.0, bitsandbytes 0.50.2, numpy 2.4.6 (Python 3.11), on an x86 CPU with AVX-512.
#
# NF4 stores one scale for each 64 values of the *flattened* weight; one expects any shape to come back with the
# rounding error of NF4, about 9%. `quantize_4bit` is right for these shapes, but `dequantize_4bit` on a CPU walks row
# by row and counts floor(columns / 64) scales a row, so that from the second row on it takes other blocks' scales if
# 64 does not divide the number of columns: an error of 26%, no warning. Widths of published models are multiples of
# 64; the tiny networks of a test suite often are not. The reference decodes the same stored bytes by the
# definition: code[4-bit index] times the scale of its block.
#
# Seen (relative error of the decoded weight):
#   (256, 256): library 0.0920, by the definition 0.0920
#   (256, 240): library 0.2579, by the definition 0.0919
#   (128, 96): library 0.2637, by the definition 0.0926

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 bitsandbytes==0.50.2

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    sys.exit("cannot tell: the behaviour was seen on a CPU with AVX-512, which this one lacks")


def errors(shape):
    """Relative errors of a weight of this shape in NF4: as the library decodes it, and by the definition."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    library = dequantize_4bit(packed, state)
    packed = packed.flatten()
    index = torch.stack([packed >> 4, packed & 15], dim=1).long()  # the high half of a byte comes first
    definition = (state.code[index].view(-1, 64) * state.absmax[:, None]).view(shape)
    library, definition = (((w - weight).norm() / weight.norm()).item() for w in (library, definition))
    print(f"{shape}: library {library:.4f}, by the definition {definition:.4f}")
    return library, definition


whole, *others = errors((256, 256)), errors((256, 240)), errors((128, 96))
if abs(whole[0] - whole[1]) > 1e-4 or any(library < 0.15 or definition > 0.12 for library, definition in others):
    sys.exit("changed: decoding no longer depends on whether 64 divides the width")
PYTHON
