"""PickScore (Kirstain et al., arXiv 2305.01569)."""

from functools import partial

from transformers import CLIPTokenizer

from diff_instruct.rewards.clip import ClipScorer
from diff_instruct.rewards.pixels import centre_square, full_precision
from diff_instruct.rewards.weights import clip_network, load_tokenizer


class PickScore(ClipScorer):
    """exp(logit_scale) · cosine, with a CLIP ViT-H/14 that was trained on people's choices; 20 to 23 is usual."""

    REPO, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, name, model, tokenizer):
        super().__init__(name, model, tokenizer, square=partial(centre_square, floor=True))

    @classmethod
    def from_pretrained(cls, path=None, cache_dir=None):
        """From the Hub, or a folder in transformers' format. Raises ValueError if it is not there or incomplete."""
        model = clip_network("pickscore", path, cls.REPO, cache_dir)
        return cls("pickscore", model, load_tokenizer(CLIPTokenizer, "pickscore", path, cls.TOKENIZER, cache_dir))

    def forward(self, pixels, prompts):
        """PickScore (B,) of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        return full_precision(self.model.logit_scale).exp() * super().forward(pixels, prompts)
