"""Where embeddings are kept, and where the text encoders are meanwhile: `--prompt_cache`, `--offload_text_encoder`."""

from contextlib import contextmanager, nullcontext
from itertools import islice

from diff_instruct.models.sharding import is_chosen
from diff_instruct.prompts.cache import PromptCache, encode_ahead, encoder_key
from diff_instruct.prompts.conditioning import Conditioning, on_device
from diff_instruct.prompts.stream import PromptStream


def takes_turns(args):
    """Whether text encoders and networks are never on the device together: where new prompts are rare, and networks
    are whole."""
    return bool(args.prompt_cache) and not is_chosen()


def text_encoders(pipe):
    """Those that a pipeline has."""
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]


def make_conditioning(args, pipe, device, networks=()):
    """The [`Conditioning`] of a run, in memory or in files; with either flag encoders come for new prompts only, with
    `--prompt_cache` in the place of the networks."""
    encoding, store, encoders = nullcontext, None, text_encoders(pipe)
    if args.prompt_cache or args.offload_text_encoder:
        away = networks if takes_turns(args) else ()
        encoding = lambda: on_device(encoders, device, instead_of=away)  # noqa: E731
    if args.prompt_cache:
        key = encoder_key(pipe.components, pipe.config.family, pipe.config.max_sequence_length)
        store = PromptCache(args.prompt_cache, key)
    return Conditioning(pipe.encode_prompt, device, store=store, encoding=encoding)


@contextmanager
def drawing(args, stock, encode, networks, device):
    """The context in which the stock pipeline draws from prompts: with text encoders on the device, or, with
    `--prompt_cache`, by diffusers' own offloading, which has one of encoders, network and VAE there at a time."""
    if not takes_turns(args):
        with encode.encoding():
            yield
        return
    for network in networks:
        network.to("cpu")
    stock.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        stock.remove_all_hooks()
        for encoder in text_encoders(stock):
            encoder.to("cpu")
        for part in (stock.vae, *networks):
            part.to(device)


def first_epoch(stream, most):
    """The prompts of a stream until it begins again, at most so many."""
    for prompt in islice(stream, most):
        yield prompt
        if stream.state["epoch"] > 0:
            return


def fill_cache(args, encode, train_prompts, others, most, process_index, processes):
    """Encode what a run of `most` draws will need, an epoch of training prompts and the others, before it starts."""
    encode.prepare(others if process_index == 0 else [])
    stream = PromptStream(train_prompts, args.seed, args.shuffle_buffer_size)
    encode_ahead(encode, first_epoch(stream, most), process_index, processes)
