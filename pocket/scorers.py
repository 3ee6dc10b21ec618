"""Stage `scorers`: two CLIP models from scratch, `pocket` to train on and `pocket_heldout` to judge with."""

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from pocket import world
from pocket.fit import fit
from pocket.text import make_tokenizer


VISION = {
    "pocket": {"patch_size": 16, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "pocket_heldout": {"patch_size": 12, "hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5},
}
FOLDERS = {"pocket": "scorer", "pocket_heldout": "scorer_heldout"}


def noisy(pixels, generator):
    """Pixels in [-1, 1] moved within the margin, with noise of a random level up to 0.3, as generators leave it."""
    shifts = torch.randint(-world.MARGIN, world.MARGIN + 1, (2,), generator=generator).tolist()
    level = 0.3 * torch.rand(len(pixels), 1, 1, 1, generator=generator) ** 2
    return torch.roll(pixels, shifts, (2, 3)) + level * torch.randn(pixels.shape, generator=generator)


def build_scorer(name, pictures, work_dir, accelerator, steps):
    """A CLIPModel of its own seed and patches on pictures and captions; pairs held out are never shown.

    Half of a batch are single pictures and half are groups of eight that share colour and background, so that telling
    nouns apart, and not only colours, is what the contrast asks for.
    """
    seed = list(VISION).index(name) + 1
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 24,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": world.RESOLUTION, "intermediate_size": 2 * VISION[name]["hidden_size"], **VISION[name]}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    captions, seen, groups = pictures.captions(), (~pictures.heldout).nonzero()[:, 0], {}
    for i in seen.tolist():
        m = pictures.meaning(i)
        groups.setdefault((m.colour, m.background), []).append(i)
    groups = [torch.tensor(group) for group in groups.values() if len(group) >= 64]

    def loss_fn(generator, batch=128):
        i = [seen[torch.randint(len(seen), (batch // 2,), generator=generator)]]
        for g in torch.randint(len(groups), (batch // 16,), generator=generator):
            i.append(groups[g][torch.randint(len(groups[g]), (8,), generator=generator)])
        i = torch.cat(i)
        x = noisy(pictures.pixels(i) * 2 - 1, generator).to(accelerator.device)
        texts = [captions[k] for k in i]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
        e_i = F.normalize(model.get_image_features(x).pooler_output.float(), dim=-1)
        e_t = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * e_t @ e_i.T
        numbers = torch.tensor([texts.index(t) for t in texts])
        same = (numbers[:, None] == numbers[None]).float().to(accelerator.device)
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    fit(name, [model], loss_fn, steps=steps, lr=1e-3, work_dir=work_dir, accelerator=accelerator, seed=seed)
    return model, tokenizer
