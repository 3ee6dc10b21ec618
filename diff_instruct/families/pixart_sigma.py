# SPDX-License-Identifier: Apache-2.0
"""PixArt-Σ."""

from diff_instruct.families.pixart_alpha import PixArtAlpha


class PixArtSigma(PixArtAlpha):
    """PixArt-Σ: PixArt-α that reads 300 tokens, and is never told the size."""

    name = "PixArtSigmaPipeline"
    apps = {**PixArtAlpha.apps, "zeros": {}}
    max_sequence_length = 300

    @staticmethod
    def reads_the_size(pipe):
        return False
