"""Stage `text`: a word-level T5 encoder that learns what a caption says before any picture is drawn.

Released text-to-image models take a text encoder that was pre-trained on text. This one learns from captions
alone: from the state of each token, wherever it stands, linear heads must tell noun, colour and background. "red" in
"a red apple on a blue background" is then known to be the apple's.
"""

import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pocket import world
from pocket.fit import fit


KINDS = {  # what a caption can say; None where it says nothing
    "noun": [None, *world.NOUNS],
    "colour": [None, *world.HUES],
    "background": [None, *world.BACKGROUNDS],
}


def make_tokenizer():
    """A word is a token; a word that no caption has is `<unk>`."""
    words = {w for noun in world.NOUNS for w in noun.split()} | {*world.HUES, *world.BACKGROUNDS}
    words |= {"a", "an", "on", "background"}
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + w, -1.0) for w in sorted(words)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


def said(caption):
    """Indices into the lists of `KINDS`, three numbers, of a caption or of ""."""
    meaning = world.parse(caption)
    return [values.index(getattr(meaning, kind, None)) for kind, values in KINDS.items()]


def token_logits(encoder, heads, tokens):
    """Per kind, logits (B, L, n) of what the caption says, from each of its tokens."""
    states = encoder(**tokens).last_hidden_state
    return [head(states) for head in heads]


def build_text_encoder(captions, work_dir, accelerator, steps):
    """The T5EncoderModel trained on a list of captions, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer, captions = make_tokenizer(), sorted(set(captions))
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    heads = torch.nn.ModuleList(torch.nn.Linear(128, len(values)) for values in KINDS.values())

    def loss_fn(generator, batch=128):
        texts = [captions[i] for i in torch.randint(len(captions), (batch - 4,), generator=generator)] + [""] * 4
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
        targets = torch.tensor([said(text) for text in texts], device=accelerator.device)
        real = tokens.attention_mask.bool()
        losses = []
        for logits, target in zip(token_logits(encoder, heads, tokens), targets.T):
            each = target[:, None].expand(real.shape)
            losses.append(F.cross_entropy(logits[real], each[real]))
        return sum(losses)

    fit("text", [encoder, heads], loss_fn, steps=steps, lr=2e-3, work_dir=work_dir, accelerator=accelerator)
    return encoder, heads, tokenizer


@torch.no_grad()
def understood(encoder, heads, tokenizer, captions):
    """For each kind, the share of all tokens of the captions that tell it rightly."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt").to(encoder.device)
    targets, real = torch.tensor([said(c) for c in captions], device=encoder.device), tokens.attention_mask.bool()
    rates = {}
    for kind, logits, target in zip(KINDS, token_logits(encoder, heads, tokens), targets.T):
        rates[kind] = (logits.argmax(-1) == target[:, None])[real].float().mean().item()
    return rates
