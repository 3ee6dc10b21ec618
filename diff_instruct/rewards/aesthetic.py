"""The aesthetic predictor sac+logos+ava1-l14-linearMSE (Schuhmann, "improved aesthetic predictor", 2022)."""

from pathlib import Path

import torch

from diff_instruct.rewards.clip import ClipScore, ClipScorer
from diff_instruct.rewards.pixels import full_precision
from diff_instruct.rewards.weights import check_state, clip_network, find, read


REPO, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class LinearMLP(torch.nn.Module):
    """Five linear layers with dropout between them and no activation, so that `layers.N` is as published."""

    def __init__(self, size):
        super().__init__()
        sizes, dropout = (size, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
        layers = []
        for i, (n, m) in enumerate(zip(sizes, sizes[1:])):
            layers.append(torch.nn.Linear(n, m))
            layers += [torch.nn.Dropout(p) for p in dropout[i : i + 1]]
        self.layers = torch.nn.Sequential(*layers)

    @classmethod
    def from_state(cls, size, state, source):
        """With these tensors, in float32. Raises ValueError, which names `source`, if one is missing or misshapen."""
        mlp = cls(size)
        check_state(mlp.state_dict(), state, source)
        mlp.load_state_dict({k: state[k] for k in mlp.state_dict()})
        return mlp

    def forward(self, x):
        """(B, size) to (B,)."""
        return self.layers(x).squeeze(-1)


class Aesthetic(ClipScorer):
    """How much people like the picture, about 1 to 10, whatever the prompt.

    Args:
        model (`CLIPModel`): OpenAI's CLIP ViT-L/14; its text half is dropped.
        mlp (`LinearMLP`): the predictor, on the unit vector of the image.
    """

    def __init__(self, model, mlp):
        super().__init__("aesthetic", model, tokenizer=None)
        del self.model.text_model, self.model.text_projection
        self.mlp = mlp.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path=None, cache_dir=None):
        """From the Hub, or the predictor's file, or a folder with it; the CLIP may lie in the same folder.

        Raises:
            ValueError: if it is not there or incomplete.
        """
        file = find("aesthetic", path, REPO, FILE, cache_dir)
        folder = path if path is not None and (Path(path) / "config.json").is_file() else None
        model = clip_network("aesthetic", folder, ClipScore.REPO, cache_dir)
        return cls(model, LinearMLP.from_state(model.config.projection_dim, read(file), file))

    def forward(self, pixels, prompts):
        """Aesthetic score (B,) of pixels (B, 3, H, W) in [0, 1]; the prompts are not read."""
        return full_precision(self.mlp(self.image_features(pixels).to(self.dtype)))
