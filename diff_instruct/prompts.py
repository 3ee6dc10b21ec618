"""Prompts, streamed through `datasets` from the Hub or from local files, and the samples that are drawn for them."""

import csv
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node


FORMATS = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HELDOUT_EVERY = 20


def find_files(path):
    """The prompt files that a path means (itself, or those in a folder), all of one format.

    Raises:
        ValueError: if there are none, or several formats.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"prompts: no such file or folder: {path}")
    files = sorted(f for f in path.iterdir() if f.suffix in FORMATS) if path.is_dir() else [path]
    kinds = sorted({f.suffix for f in files})
    if len(kinds) != 1 or kinds[0] not in FORMATS:
        found = ", ".join(kinds) or "nothing"
        raise ValueError(f"prompts: {path} must hold files of one of {', '.join(FORMATS)}, but holds {found}")
    return [str(f) for f in files]


def open_prompts(source, name=None, split="train", column=None, local=False, cache_dir=None, category=None):
    """A streamed dataset with one column, `text`, or two, `text` and `category`.

    Args:
        source (`str`): a Hub id, or with `local` a file or folder.
        column (`str`, *optional*): the column with the prompts; may be left out if there is only one.
        category (`str`, *optional*): the column with the prompts' categories.

    Raises:
        ValueError: if there are no rows, no such column, or several and none is named.
    """
    if local:
        files = find_files(source)
        kind = FORMATS[Path(files[0]).suffix]
        options = {"keep_default_na": False} if kind == "csv" else {}  # "null" may be a prompt
        if files[0].endswith(".tsv"):
            options.update(sep="\t", quoting=csv.QUOTE_NONE)  # a quotation mark in a .tsv is part of the text
        if all(Path(f).stat().st_size == 0 for f in files):
            raise ValueError(f"{source} is empty: it must hold at least one prompt")
        dataset = load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=cache_dir, **options)
    else:
        dataset = load_dataset(source, name, split=split, streaming=True, cache_dir=cache_dir)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source} is empty: it must hold at least one prompt")
    if column is None and len(first) == 1:
        column = next(iter(first))
    if column not in first:
        raise ValueError(f"{source} has no column `{column}`; set --caption_column to one of: {', '.join(first)}")
    if category is not None and category not in first:
        raise ValueError(f"{source} has no column `{category}`; set --category_column to one of: {', '.join(first)}")
    names = {column: "text"} if category is None else {column: "text", category: "category"}
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def split_heldout(dataset, n_heldout):
    """(training prompts, held-out prompts): every 20th row, `n_heldout` of them at most, is never trained on."""

    def is_heldout(i):
        return i % HELDOUT_EVERY == 0 and i < n_heldout * HELDOUT_EVERY

    train = dataset.filter(lambda _, i: not is_heldout(i), with_indices=True)
    return train, dataset.filter(lambda _, i: is_heldout(i), with_indices=True)


def load_prompts(args):
    """(streamed training prompts, list of held-out prompts to judge with), as the arguments say.

    Raises:
        ValueError: see `open_prompts`.
    """
    options = {"column": args.caption_column, "cache_dir": args.cache_dir}
    if args.train_prompts is not None:
        dataset = open_prompts(args.train_prompts, local=True, **options)
    else:
        options.update(name=args.dataset_config_name, split=args.dataset_split)
        dataset = open_prompts(args.dataset_name, **options)
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    if args.eval_prompts is not None:
        heldout = open_prompts(args.eval_prompts, local=True)
    else:
        dataset, heldout = split_heldout(dataset, args.num_eval_prompts)
    return dataset, [row["text"] for row in heldout.take(args.num_eval_prompts)]


class PromptStream:
    """An endless, shuffled stream of prompts, this process's share of it, that can be continued exactly.

    Args:
        dataset: from `open_prompts`.
        seed (`int`), buffer_size (`int`): of the shuffle, new in each epoch.
    """

    def __init__(self, dataset, seed, buffer_size, process_index=0, num_processes=1):
        dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self.dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.epoch, self.position = 0, 0
        self.iterator = None

    def __next__(self):
        if self.iterator is None:
            self.dataset.set_epoch(self.epoch)  # `skip` would drop rows before they are shared out, not after
            self.iterator = islice(iter(self.dataset), self.position, None)
        for row in self.iterator:
            self.position += 1
            if row["text"] and row["text"].strip():
                return row["text"]
        if self.position == 0:
            raise ValueError("there are fewer prompts than processes: each process needs at least one")
        self.epoch, self.position, self.iterator = self.epoch + 1, 0, None
        return next(self)

    def state_dict(self):
        """Where the stream stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        """Continue from there."""
        self.epoch, self.position, self.iterator = state["epoch"], state["position"], None


class Sampler:
    """Draws the c, z, t and ε of Algorithm 1; each sample's noise comes from (seed, its number over all processes).

    So a run that is continued draws what it would have drawn, and two processes with batch b draw what one process
    with batch 2b draws.

    Args:
        prompts: a [`PromptStream`].
        steps (`int`): n, those of the generator.
    """

    def __init__(
        self, prompts, latent_shape, batch_size, seed, process_index=0, num_processes=1, device="cpu", steps=1
    ):
        self.prompts, self.latent_shape, self.batch_size, self.seed = prompts, latent_shape, batch_size, seed
        self.process_index, self.num_processes, self.device = process_index, num_processes, device
        self.steps, self.drawn = steps, 0

    def __call__(self):
        """Prompts c, a list of B; noise z and ε, (B, C, H, W) each; u ~ U[0, 1), (B,), to draw timesteps with.

        And for `OneStepPipeline.generate`: the noise of further steps, (n − 1, B, C, H, W), and the step whose x0 is
        taken, uniform on 0..n − 1, (B,).
        """
        prompts, noise, uniform, further, step = [], [], [], [], []
        for _ in range(self.batch_size):
            number = self.drawn * self.num_processes + self.process_index
            entropy = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
            rng = torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))
            prompts.append(next(self.prompts))
            noise.append(torch.randn(2, *self.latent_shape, generator=rng))
            uniform.append(torch.rand((), generator=rng))
            further.append(torch.randn(self.steps - 1, *self.latent_shape, generator=rng))
            step.append(torch.randint(self.steps, (), generator=rng))
            self.drawn += 1
        z, eps = torch.stack(noise, dim=1).to(self.device)
        further, step = torch.stack(further, dim=1).to(self.device), torch.stack(step).to(self.device)
        return prompts, z, eps, torch.stack(uniform), further, step

    def state_dict(self):
        """Where the draws stand."""
        return {"drawn": self.drawn, "prompts": self.prompts.state_dict()}

    def load_state_dict(self, state):
        """Continue from there."""
        self.drawn = state["drawn"]
        self.prompts.load_state_dict(state["prompts"])


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
