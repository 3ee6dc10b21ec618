"""Weights in the original (LDM) layout, by diffusers' own conversion of that layout, read backwards.

`from_single_file` turns a file in the original layout into the names of diffusers. Here its converters are given
every name that the original layout may have, each with a tag for a weight: the diffusers name that a tag comes out
under is the pair of that name. So the pairs are the library's; what is written is converted once more, and compared.
"""

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    LDM_UNET_KEY,
    LDM_VAE_KEYS,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)


RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
VAE_PARTS = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut", "norm", "q", "k", "v", "proj_out")


def both(names):
    """Weight and bias of each."""
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def converted(convert, names):
    """{name in diffusers: original name} of the names that a converter of the library knows."""
    tags = convert({name: torch.tensor(i) for i, name in enumerate(names)})
    return {key: names[int(tag)] for key, tag in tags.items() if tag is not None}


def unet_names(unet):
    """{name in diffusers: original name} of every weight of a `UNet2DConditionModel`."""
    ours, layers = list(unet.state_dict()), unet.config.layers_per_block + 1
    inside = sorted({key.split(".attentions.")[1].partition(".")[2] for key in ours if ".attentions." in key})
    table = DIFFUSERS_TO_LDM_MAPPING["unet"]
    fixed = {name for part in table.values() for name in part.values()}
    down = [f"input_blocks.{i}" for i in range(1, layers * len(unet.config.down_block_types))]
    up = [f"output_blocks.{i}" for i in range(layers * len(unet.config.up_block_types))]
    names = [*fixed, *(f"middle_block.{i}.{part}" for i in (0, 2) for part in both(RESNET))]
    names += [f"middle_block.1.{part}" for part in inside]
    for block in down + up:
        names += [f"{block}.0.{part}" for part in both(RESNET)] + [f"{block}.1.{part}" for part in inside]
    names += both(f"{block}.0.op" for block in down)

    def convert(state):
        return convert_ldm_unet_checkpoint({LDM_UNET_KEY + key: value for key, value in state.items()}, unet.config)

    # An upsampler is the last layer of its block: after the attention, if there is one.
    known = {name for key, name in converted(convert, names).items() if key in set(ours)}
    for block in up:
        attends = any(name.startswith(f"{block}.1.") for name in known)
        names += both([f"{block}.{2 if attends else 1}.conv"])
    return converted(convert, names)


def vae_names(vae):
    """{name in diffusers: original name} of every weight of an `AutoencoderKL`."""
    n, layers = len(vae.config.down_block_types), vae.config.layers_per_block + 1
    blocks = [f"encoder.down.{i}.block.{j}" for i in range(n) for j in range(layers)]
    blocks += [f"decoder.up.{i}.block.{j}" for i in range(n) for j in range(layers)]
    blocks += [f"{side}.mid.{part}" for side in ("encoder", "decoder") for part in ("block_1", "block_2", "attn_1")]
    ends = [f"encoder.down.{i}.downsample.conv" for i in range(n)] + [
        f"decoder.up.{i}.upsample.conv" for i in range(n)
    ]
    names = [*DIFFUSERS_TO_LDM_MAPPING["vae"].values(), *both(ends)]
    names += [name for block in blocks for name in both(f"{block}.{part}" for part in VAE_PARTS)]
    return converted(lambda state: convert_ldm_vae_checkpoint(dict(state), vae.config), names)


def renamed(state, names, prefix):
    """The weights of `state` by their original names; raises KeyError if the library does not know one."""
    return {prefix + names[key]: value for key, value in state.items()}


def unet_layout(unet):
    """The UNet's weights, by the names of the original layout."""
    state = renamed(unet.state_dict(), unet_names(unet), LDM_UNET_KEY)
    check(unet, convert_ldm_unet_checkpoint(dict(state), unet.config))
    return state


def vae_layout(vae):
    """The VAE's weights, by the names and in the shapes of the original layout: its attention is a 1×1 convolution."""
    names = vae_names(vae)
    state = renamed(vae.state_dict(), names, LDM_VAE_KEYS[0])
    for key in state:
        if ".attn_1." in key and key.endswith("weight") and state[key].ndim == 2:
            state[key] = state[key][:, :, None, None]
    check(vae, convert_ldm_vae_checkpoint(dict(state), vae.config))
    return state


def clip_state(text_encoder):
    """A CLIP text encoder's weights by the names that all files have; transformers has dropped a prefix."""
    state = text_encoder.state_dict()
    if any(key.startswith("text_model.") for key in state):
        return state
    return {f"text_model.{key}": value for key, value in state.items()}


def clip_layout(text_encoder, prefix):
    """A CLIP text encoder's weights as the original layout has OpenAI's."""
    return {prefix + key: value for key, value in clip_state(text_encoder).items()}


def open_clip_layout(text_encoder, prefix):
    """A CLIP text encoder's weights as the original layout has OpenCLIP's: query, key and value are one matrix."""
    table, state = DIFFUSERS_TO_LDM_MAPPING["openclip"], {}
    ours = clip_state(text_encoder)
    for key, value in ours.items():
        if key in table["layers"]:
            name = table["layers"][key]
            state[prefix + name] = value.T.contiguous() if name == "text_projection" else value
            continue
        name = key
        for new, old in table["transformer"].items():
            name = name.replace(new, old)
        if ".q_proj." in key:
            parts = [ours[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            name = name.replace(".q_proj.", ".in_proj_")
            state[f"{prefix}transformer.{name}"] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            state[f"{prefix}transformer.{name}"] = value
    return state


def check(network, state):
    """Raises RuntimeError unless the library's conversion gives the network's own weights again."""
    ours = network.state_dict()
    wrong = [
        k for k in ours.keys() | state.keys() if k not in ours or k not in state or not torch.equal(ours[k], state[k])
    ]
    if wrong:
        raise RuntimeError(f"diffusers' conversion does not give {len(wrong)} weights back, such as {wrong[0]}")


def single_file(pipe):
    """The whole of a Stable Diffusion or SDXL pipeline in the original layout."""
    state = unet_layout(pipe.unet) | vae_layout(pipe.vae)
    for name, (layout, prefix) in pipe.family.original_text_encoders(pipe).items():
        state |= TEXT_LAYOUTS[layout](getattr(pipe, name), prefix)
    return state


TEXT_LAYOUTS = {"clip": clip_layout, "open_clip": open_clip_layout}
