"""A frozen base in 8 or 4 bits: which layers are rounded to what, and layers that hold rounded weights.

int8: each row of a weight has one scale, a bfloat16 number, so that it is exact in bfloat16 and in float32.
nf4: the 16 levels of QLoRA (Dettmers et al., arXiv 2305.14314) in blocks of 64, whose scales are rounded to 8 bits in
blocks of 256; bitsandbytes rounds and decodes.

Neither library's own layer does here what is needed: with torchao's (0.18) the graph holds a decoded copy of every
weight; that of bitsandbytes (0.50) casts to float16 for int8 on a GPU, and for 4 bits on a CPU decodes wrongly where a
row is no multiple of a block, and loses the gradient once it has repacked a weight for inference. Here a graph holds
the rounded weight and decodes it again.
"""

import torch
from torch import nn


KINDS = ("none", "int8", "nf4")
BLOCK, OUTER = 64, 256  # nf4: weights that share a scale, and scales that share one
CHUNK = 2**20  # weights that are rounded at a time


def rows_at_a_time(weight):
    """How many rows of a weight to round together, which takes several copies of them. What stays is allocated first,
    or memory ends up in pieces."""
    return max(BLOCK, CHUNK // weight.shape[1] // BLOCK * BLOCK)


def encode_int8(weight):
    """Codes (out, in) and scales (out, 1) of a weight."""
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = torch.empty_like(weight[:, :1], dtype=torch.bfloat16)
    for rows, code, scale in zip(*(t.split(rows_at_a_time(weight)) for t in (weight, codes, scales))):
        scale.copy_((rows.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.bfloat16).tiny))
        code.copy_((rows.float() / scale.float()).round_().clamp_(-127, 127))
    return {"weight": codes, "scale": scales}


def decode_int8(parts, shape, dtype):
    return parts["weight"].to(dtype).mul_(parts["scale"].to(dtype))


def encode_nf4(weight):
    """Codes, two to a byte, scales in 8 bits, and theirs: as bitsandbytes' `quantize_4bit` of all of it."""
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales, end = torch.empty(weight.numel() // BLOCK, device=weight.device), 0
    for rows in weight.split(rows_at_a_time(weight)):
        part, state = quantize_4bit(rows.flatten(), blocksize=BLOCK, quant_type="nf4")
        start, end = end, end + rows.numel()
        codes[start // 2 : end // 2] = part.flatten()
        scales[start // BLOCK : end // BLOCK] = state.absmax
    offset = scales.mean()
    scales, outer = quantize_blockwise(scales - offset, blocksize=OUTER)
    return nf4_parts(codes, QuantState(scales, offset=offset, state2=outer))


def nf4_parts(codes, state):
    """The tensors of bitsandbytes' codes and `QuantState`."""
    parts = {"weight": codes.flatten(), "absmax": state.absmax, "offset": state.offset.reshape(())}
    return parts | {"outer": state.state2.absmax, "levels": state.state2.code}


def decode_nf4(parts, shape, dtype):
    """As one row of blocks, whatever the width."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    outer = QuantState(parts["outer"], code=parts["levels"], blocksize=OUTER, dtype=torch.float32)
    numel = shape[0] * shape[1]
    options = {"shape": torch.Size([numel]), "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
    state = QuantState(parts["absmax"], offset=parts["offset"], state2=outer, **options)
    return dequantize_4bit(parts["weight"].view(-1, 1), state).view(shape)


ENCODE = {"int8": encode_int8, "nf4": encode_nf4}
DECODE = {"int8": decode_int8, "nf4": decode_nf4}
PARTS = {"int8": ("weight", "scale"), "nf4": ("weight", "absmax", "offset", "outer", "levels")}


def empty_parts(kind, shape):
    """The tensors of a rounded weight (out, in), on the meta device."""
    rows, columns = shape
    blocks = rows * columns // BLOCK
    sizes = {
        "int8": (((rows, columns), torch.int8), ((rows, 1), torch.bfloat16)),
        "nf4": (
            ((blocks * BLOCK // 2,), torch.uint8),
            ((blocks,), torch.uint8),
            ((), torch.float32),
            ((-(-blocks // OUTER),), torch.float32),
            ((256,), torch.float32),
        ),
    }[kind]
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in zip(PARTS[kind], sizes)}


class Product(torch.autograd.Function):
    """x Wᵀ + b with a frozen, rounded W, which both passes decode."""

    @staticmethod
    def forward(ctx, x, bias, kind, shape, *parts):
        ctx.kind, ctx.shape = kind, shape
        ctx.save_for_backward(*parts)
        return nn.functional.linear(x, decoded(kind, shape, parts, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        parts = ctx.saved_tensors  # once: checkpointing computes them again when they are asked for
        return gradient @ decoded(ctx.kind, ctx.shape, parts, gradient.dtype), *[None] * (3 + len(parts))


def decoded(kind, shape, parts, dtype):
    return DECODE[kind](dict(zip(PARTS[kind], parts)), shape, dtype)


class Rounded(nn.Linear):
    """A linear layer with a frozen, rounded weight.

    Args:
        linear: a layer for its sizes and its bias, which is kept as it is.
        kind: "int8" or "nf4".
        parts (`dict`): of the weight, see `PARTS`; by default on the meta device.
    """

    def __init__(self, linear, kind, parts=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.register_parameter("bias", linear.bias)
        self.published = None  # a function that reads the weight as it is published, while that is to be used instead
        self.hold(parts or empty_parts(kind, linear.weight.shape))

    def hold(self, parts):
        """Take these as the weight's."""
        self.weight = nn.Parameter(parts["weight"], requires_grad=False)
        for name in PARTS[self.kind][1:]:
            self.register_buffer(name, parts[name])

    def _apply(self, function, recurse=True):
        """Moves between devices; the dtypes of a weight's parts are those of its format, whatever a network's are."""
        parts = [self.weight, *(getattr(self, name) for name in PARTS[self.kind][1:])]
        dtypes = [part.dtype for part in parts]
        super()._apply(function, recurse)
        for name, dtype, old in zip(PARTS[self.kind][1:], dtypes[1:], parts[1:]):
            if getattr(self, name).dtype != dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self

    @property
    def shape(self):
        """Of the weight, (out, in)."""
        return self.out_features, self.in_features

    def parts(self):
        """The tensors that the weight consists of, in the order of `PARTS`."""
        return tuple(getattr(self, name) for name in PARTS[self.kind])

    def decode(self, dtype=torch.float32):
        """The weight that the codes stand for."""
        return decoded(self.kind, self.shape, self.parts(), dtype)

    def forward(self, x):
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.published is not None:
            return nn.functional.linear(x, self.published().to(x), bias)
        return Product.apply(x, bias, self.kind, self.shape, *self.parts())


def repeated_blocks(network):
    """The blocks that a network repeats, by name, as diffusers names them."""
    classes = network._repeated_blocks or network._no_split_modules or ()
    return {name: module for name, module in network.named_modules() if type(module).__name__ in classes}


def rounding(family, network, asked):
    """What each layer of a network is rounded to: name to "int8" or "nf4".

    These are the linear layers of the blocks that the network repeats, so embedders, the projections of times and
    texts, and the last layers stay as they are, and so does what the family (`unrounded`) or diffusers
    (`_keep_in_fp32_modules`) names. What modulates, which is as sensitive as it is small in use, has 8 bits at least
    (the family's `modulation`, diffusers' `_skip_layerwise_casting_patterns`), and so has a weight that no whole
    number of blocks makes.

    Args:
        network: it may be on the meta device.
        asked (`str`): of `--base_quantization`.
    """
    if asked == "none":
        return {}
    kept = (*family.unrounded, *(network._keep_in_fp32_modules or ()))
    careful = (*family.modulation, *(network._skip_layerwise_casting_patterns or ()))
    found = {}
    for block_name, block in repeated_blocks(network).items():
        for name, layer in block.named_modules():
            if type(layer) is not nn.Linear or any(word in f"{block_name}.{name}" for word in kept):
                continue
            coarse = asked == "nf4" and not any(word in name for word in careful)
            found[f"{block_name}.{name}"] = "nf4" if coarse and layer.weight.numel() % BLOCK == 0 else "int8"
    return found


def round_empty(network, plan):
    """Put [`Rounded`] layers into a network on the meta device, as a plan of `rounding` says; returns it."""
    for name, kind in plan.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Rounded(network.get_submodule(name), kind))
    return network


def stored_bytes(network, dtype_bytes):
    """Bytes of a network's weights, what is not rounded at `dtype_bytes` a number; adapters are left out."""
    rounded = {id(part) for layer in rounded_layers(network) for part in layer.parts()}
    parts = {id(p): p for layer in rounded_layers(network) for p in layer.parts()}
    plain = [p for name, p in network.named_parameters() if id(p) not in rounded and ".lora_" not in name]
    return sum(p.numel() * p.itemsize for p in parts.values()) + dtype_bytes * sum(p.numel() for p in plain)


def rounded_layers(network):
    """The layers whose weights are rounded."""
    return [m for m in network.modules() if isinstance(m, Rounded)]
