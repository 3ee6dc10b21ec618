"""Prompts to the conditioning c that the networks take."""

from contextlib import contextmanager, nullcontext

import torch


CUT = ("encoder_hidden_states", "encoder_attention_mask")  # what has a row of tokens for each prompt


def nbytes(tensors):
    """Size of a dictionary of tensors."""
    return sum(v.nbytes for v in tensors.values())


def split(c):
    """The rows of c, on the CPU, each without its padding.

    Padding is what an `encoder_attention_mask` of integers or booleans leaves out at the end. Without such a mask it
    is part of c and stays (SD3 and FLUX attend to it).
    """
    c = {k: v.cpu() for k, v in c.items()}
    mask, rows = c.get("encoder_attention_mask"), []
    masked = mask is not None and not mask.is_floating_point()
    for i in range(len(next(iter(c.values())))):
        length = int(mask[i].nonzero().max()) + 1 if masked and mask[i].any() else None  # all masked: all are seen
        rows.append({k: (v[i, :length] if masked and k in CUT else v[i]).clone() for k, v in c.items()})
    return rows


def join(rows, device):
    """c of these rows, on the device; the padding is as long as it must be, and zero."""
    c = {}
    for k in rows[0]:
        values = [row[k] for row in rows]
        c[k] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if k in CUT else torch.stack(values)
    return {k: v.to(device) for k, v in c.items()}


class Memory:
    """Rows of c by prompt, in host memory; the oldest are forgotten beyond `max_bytes`."""

    def __init__(self, max_bytes=4 * 2**30):
        self.rows, self.bytes, self.max_bytes = {}, 0, max_bytes

    def __contains__(self, prompt):
        return prompt in self.rows

    def get(self, prompt):
        return self.rows.get(prompt)

    def put(self, prompt, row):
        self.rows[prompt] = row
        self.bytes += nbytes(row)
        while self.bytes > self.max_bytes:
            self.bytes -= nbytes(self.rows.pop(next(iter(self.rows))))

    def flush(self):
        """Nothing to write."""


@contextmanager
def on_device(modules, device, instead_of=()):
    """Modules are on the device inside, and on the CPU after; others make room meanwhile, and are back after."""
    for module in instead_of:
        module.to("cpu")
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")
        for module in instead_of:
            module.to(device)


class Conditioning:
    """Prompts to the conditioning c that the networks take; every prompt is encoded once and kept.

    The encoder always sees batches of one shape, so that a prompt's embedding does not depend, not even by rounding,
    on what was encoded with it: a continued run, whose memory is empty, sees the same numbers, and two processes see
    those of one.

    Args:
        encode_prompt: `OneStepPipeline.encode_prompt`: B prompts to a dictionary of tensors with B rows.
        batch_size (`int`): prompts encoded at a time; what is missing is filled up, so 1 wastes nothing.
        store ([`Memory`] or [`PromptCache`], *optional*): where rows are kept; by default in memory.
        encoding: makes a context in which `encode_prompt` is called, only when a prompt is new: for example
            `lambda: on_device(text_encoders, device)`, with which they stay on the CPU otherwise.
    """

    def __init__(self, encode_prompt, device, batch_size=1, store=None, encoding=nullcontext):
        self.encode_prompt, self.device, self.batch_size = encode_prompt, device, batch_size
        self.store, self.encoding = Memory() if store is None else store, encoding

    def __call__(self, prompts):
        """c of B prompts: a dictionary of tensors with B rows, on the device."""
        rows = {p: self.store.get(p) for p in prompts}
        rows.update(self.encode(p for p, row in rows.items() if row is None))
        return join([rows[p] for p in prompts], self.device)

    @torch.no_grad()
    def null(self, encode_null):
        """∅, one row on the device, from `OneStepPipeline.encode_null`."""
        with self.encoding():
            return join(split(encode_null()), self.device)

    def prepare(self, prompts):
        """Encode those of the prompts that are new, and keep them; their c is not made."""
        self.encode(p for p in prompts if p not in self.store)

    @torch.no_grad()
    def encode(self, prompts):
        """{prompt: its row} of new prompts, which are kept; the empty one, ∅, is encoded by itself."""
        prompts, rows = sorted(set(prompts)), {}
        if not prompts:
            return rows
        empty, others = [[p] for p in prompts if p == ""], [p for p in prompts if p != ""]
        parts = [others[i : i + self.batch_size] for i in range(0, len(others), self.batch_size)]
        with self.encoding():
            for part in empty + parts:
                filled = part + part[-1:] * (self.batch_size - len(part))
                rows.update(zip(part, split(self.encode_prompt(filled))))
        for prompt, row in rows.items():
            self.store.put(prompt, row)
        return rows

    def flush(self):
        """Write what a [`PromptCache`] has not written yet."""
        self.store.flush()
