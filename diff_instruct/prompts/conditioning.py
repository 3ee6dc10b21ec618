"""Prompts to the conditioning c that the networks take."""

import torch


def nbytes(tensors):
    """Size of a dictionary of tensors."""
    return sum(v.nbytes for v in tensors.values())


class Conditioning:
    """Prompts to the conditioning c that the networks take; every prompt is encoded once and kept on the CPU.

    The encoder always sees batches of one shape, so that a prompt's embedding does not depend, not even by rounding,
    on what was encoded with it: a continued run, whose memory is empty, sees the same numbers.

    Args:
        encode_prompt: `OneStepPipeline.encode_prompt`.
        batch_size (`int`): prompts encoded at a time.
        max_bytes (`int`): the oldest prompts are forgotten beyond this size.
    """

    def __init__(self, encode_prompt, device, batch_size=16, max_bytes=4 * 2**30):
        self.encode_prompt, self.device = encode_prompt, device
        self.batch_size, self.max_bytes = batch_size, max_bytes
        self.cache, self.bytes = {}, 0

    @torch.no_grad()
    def __call__(self, prompts):
        """c of B prompts: a dictionary of tensors with B rows, on the device."""
        new = sorted(set(prompts) - self.cache.keys())
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            filled = part + [""] * (self.batch_size - len(part))
            encoded = {k: v.cpu() for k, v in self.encode_prompt(filled).items()}
            masked = "encoder_attention_mask" in encoded  # then padding is not kept
            lengths = encoded["encoder_attention_mask"].sum(dim=1).tolist() if masked else [None] * len(part)
            for i, (prompt, n) in enumerate(zip(part, lengths)):
                self.cache[prompt] = {k: v[i, :n].clone() for k, v in encoded.items()}
                self.bytes += nbytes(self.cache[prompt])
        rows = [self.cache[p] for p in prompts]
        while self.bytes > self.max_bytes:
            self.bytes -= nbytes(self.cache.pop(next(iter(self.cache))))
        return {
            k: torch.nn.utils.rnn.pad_sequence([row[k] for row in rows], batch_first=True).to(self.device)
            for k in rows[0]
        }
