"""Encoded prompts on disk, shared by processes and by runs."""

import hashlib
import json
import logging
import os
import time
import uuid
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.conditioning import nbytes


logger = logging.getLogger(__name__)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class PromptCache:
    """Rows of c by prompt, in files that are memory-mapped: a store for [`Conditioning`], larger than memory.

    Rows are gathered and written as safetensors files of some hundred rows, each under a name of its own, first as
    `.partial`, then renamed. So files are whole or absent after a kill, processes never wait for one another, and at
    worst a prompt is encoded twice. What others have written is found when a prompt is missing. In memory are 200
    bytes for each prompt, and the rows that are not written yet.

    Args:
        folder: of the cache; rows lie in a folder inside for each `key`.
        key (`str`): tells encoders apart, see `encoder_key`.
        max_rows (`int`), max_bytes (`int`): a file is written when so much is gathered.

    Raises:
        Mistake: if the folder cannot be written or holds a damaged file.
    """

    def __init__(self, folder, key, max_rows=256, max_bytes=2**28):
        self.folder = Path(folder) / digest(key).hex()
        self.max_rows, self.max_bytes, self.full = max_rows, max_bytes, False
        self.files, self.index = [], {}  # paths; digest of a prompt to (number of the file, number of the row)
        self.known, self.looked = set(), None  # names of files; the folder's time when it was last read
        self.opened, self.gathered, self.bytes = {}, {}, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / f"{uuid.uuid4().hex}.partial"  # other processes may begin at the same time
            aside.write_text(key + "\n")
            os.replace(aside, self.folder / "key.txt")
            for file in self.folder.glob("*.partial"):
                with suppress(FileNotFoundError):  # another process has renamed or removed it
                    if time.time() - file.stat().st_mtime > 3600:  # of a process that was killed
                        file.unlink()
        except OSError as error:
            raise Mistake(f"--prompt_cache {folder} cannot be written: {error.strerror}") from None
        self.look()

    def look(self):
        """Learn what files there are."""
        now = self.folder.stat().st_mtime_ns
        if now == self.looked:
            return
        self.looked = now
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if entry.name.endswith(".safetensors") and entry.name not in self.known:
                try:
                    with safe_open(entry.path, "pt") as file:
                        self.add(entry.path, json.loads(file.metadata()["prompts"]))
                except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                    raise Mistake(f"--prompt_cache: {entry.path} is damaged ({error}): delete it") from None

    def add(self, path, digests):
        self.known.add(os.path.basename(path))
        self.files.append(path)
        for i, name in enumerate(digests):
            self.index[bytes.fromhex(name)] = len(self.files) - 1, i

    def __len__(self):
        return len(self.index) + len(self.gathered)

    def __contains__(self, prompt):
        if prompt in self.gathered or digest(prompt) in self.index:
            return True
        self.look()
        return digest(prompt) in self.index

    def get(self, prompt):
        """The row, its tensors mapped from the file and not to be written to; None if it is not there."""
        if prompt in self.gathered:
            return self.gathered[prompt]
        if prompt not in self:
            return None
        number, i = self.index[digest(prompt)]
        file, names = self.opened.pop(number, None) or self.open(number)
        self.opened[number] = file, names  # now the newest
        if len(self.opened) > 64:
            del self.opened[next(iter(self.opened))]
        return {name: file.get_tensor(f"{i}.{name}") for name in names}

    def open(self, number):
        file = safe_open(self.files[number], "pt")
        return file, json.loads(file.metadata()["names"])

    def put(self, prompt, row):
        self.gathered[prompt] = row
        self.bytes += nbytes(row)
        if len(self.gathered) >= self.max_rows or self.bytes >= self.max_bytes:
            self.flush()

    def flush(self):
        """Write the rows that are gathered; on a full disk they are forgotten, with one warning."""
        rows, self.gathered, self.bytes = self.gathered, {}, 0
        if not rows or self.full:
            return
        digests = [digest(prompt).hex() for prompt in rows]
        names = list(next(iter(rows.values())))
        tensors = {f"{i}.{k}": v.contiguous() for i, row in enumerate(rows.values()) for k, v in row.items()}
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = file.with_suffix(".partial")
        try:
            save_file(tensors, partial, {"prompts": json.dumps(digests), "names": json.dumps(names)})
            with open(partial, "rb") as f:
                os.fsync(f.fileno())
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self.full = True
            logger.warning(
                f"--prompt_cache: {self.folder} takes no more prompts ({error}): they are encoded each time"
            )
            return
        self.add(str(file), digests)


def checksum(state):
    """Of the bits of tensors by name, such as a `state_dict`, the same on every device."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        bits = value.detach().contiguous().view(-1).view(INTEGERS[value.element_size()])
        total.update(f"{name} {tuple(value.shape)} {value.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return total.hexdigest()


def encoder_key(components, *settings):
    """A string that differs where embeddings do: other weights, precision, vocabulary or settings; wherever it lies.

    Args:
        components (`dict`): of a pipeline, by name; its tokenizers, processors and text encoders count.
        settings: whatever else `encode_prompt` depends on, for example the family's name and `max_sequence_length`.
    """
    key = {"settings": [str(setting) for setting in settings]}
    for name, part in sorted(components.items()):
        if name.startswith(("tokenizer", "processor")) and part is not None:
            words = part if hasattr(part, "get_vocab") else part.tokenizer  # of a processor
            template = getattr(part, "chat_template", None)
            told = [sorted(words.get_vocab().items()), words.model_max_length, words.padding_side, template]
            key[name] = [type(part).__name__, digest(json.dumps(told)).hex()]
        elif name.startswith("text_encoder") and part is not None:
            key[name] = [type(part).__name__, str(part.dtype), checksum(part.state_dict())]
    return json.dumps(key)


def encode_ahead(encode, prompts, process_index=0, num_processes=1, total=None):
    """Encode prompts before they are needed, with a bar; this process takes every `num_processes`-th of them.

    Args:
        encode ([`Conditioning`]): with a [`PromptCache`].
        prompts: an iterable that ends: all of a file, or `islice(stream, n)`, those that a run will draw.
        total (`int`, *optional*): how many there are, for the bar.
    """
    share = islice(prompts, process_index, None, num_processes)
    total = total and len(range(process_index, total, num_processes))
    bar = tqdm(share, desc="encoding prompts", total=total, disable=process_index > 0)
    try:
        while part := list(islice(bar, 64)):
            encode.prepare(part)
    finally:  # also on Ctrl-C: it may be minutes of work
        encode.flush()
