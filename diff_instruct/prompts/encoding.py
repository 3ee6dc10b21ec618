"""Where embeddings are kept, and where the text encoders are meanwhile: `--prompt_cache`, `--offload_text_encoder`."""

from contextlib import nullcontext
from itertools import islice

from diff_instruct.prompts.cache import PromptCache, encode_ahead, encoder_key
from diff_instruct.prompts.conditioning import Conditioning, on_device
from diff_instruct.prompts.stream import PromptStream


def make_conditioning(args, pipe, device):
    """The [`Conditioning`] of a run, in memory or in files; with either flag encoders come for new prompts only."""
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    encoding, store = nullcontext, None
    if args.prompt_cache or args.offload_text_encoder:
        encoding = lambda: on_device(encoders, device)  # noqa: E731
    if args.prompt_cache:
        key = encoder_key(pipe.components, pipe.config.family, pipe.config.max_sequence_length)
        store = PromptCache(args.prompt_cache, key)
    return Conditioning(pipe.encode_prompt, device, store=store, encoding=encoding)


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
