"""Prompts that a generator reads in part only, as its text encoders cut them: counted with their tokenizers alone."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding, PreTrainedTokenizerBase

from diff_instruct.models.configs import class_of, read_index
from diff_instruct.plan.activations import hollow
from diff_instruct.rewards.specs import read_rewards
from pipeline_one_step import OneStepPipeline


PROBE = "Zyx Wvu"
MOST = 200_000  # prompts that are counted
AT_A_TIME = 1000
NO_LIMIT = 1_000_000  # transformers' number for none is larger


@dataclass(frozen=True)
class Reading:
    """What one tokenizer is given of a prompt.

    Args:
        tokenizer: of the pipeline.
        before, after: what stands around the prompt.
        lower: whether the prompt is put in small letters.
        limit: tokens that are kept, `before` and `after` included.
    """

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str
    lower: bool
    limit: int

    @classmethod
    def of_probe(cls, tokenizer, text, limit):
        """From the text that it is given when the prompt is `PROBE`."""
        before, found, after = text.partition(PROBE)
        if found:
            return cls(tokenizer, before, after, False, limit)
        before, _, after = text.partition(PROBE.lower())
        return cls(tokenizer, before, after, True, limit)

    def lengths(self, prompts):
        """Tokens of each of them, uncut."""
        texts = [self.before + (p.lower() if self.lower else p) + self.after for p in prompts]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    @property
    def around(self):
        """Tokens of what stands around, if anything does."""
        return self.lengths([""])[0] if self.before or self.after else 0


class Heard:
    """A tokenizer that notes what it is asked for of the prompt, and returns as many tokens as there can be; what else
    it is asked, such as the words around a prompt, it answers.

    Args:
        asked: the tokenizer, or the processor that holds it, whose chat template then counts.
    """

    def __init__(self, asked, readings):
        self.asked, self.readings = asked, readings
        self.inner = asked if isinstance(asked, PreTrainedTokenizerBase) else asked.tokenizer

    def __getattr__(self, name):
        return getattr(self.asked, name)

    @property
    def tokenizer(self):
        return Heard(self.inner, self.readings)

    def apply_chat_template(self, chats, tokenize=True, add_generation_prompt=False, **options):
        template = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if not tokenize:
            return self.asked.apply_chat_template(chats, **template, **options)
        return self([self.asked.apply_chat_template(chat, **template) for chat in chats], **options)

    def pad(self, tokens, max_length=None, **options):  # of a family that cuts the tokens itself
        self.readings.append(Reading(self.inner, "", "", False, max_length))
        return self.inner.pad(tokens, max_length=max_length, **options)

    def __call__(self, prompt=None, max_length=None, text=None, **options):
        prompt = text if prompt is None else prompt
        if isinstance(prompt, str) or PROBE.lower() not in prompt[0].lower():
            return self.inner(prompt, max_length=max_length, **options)
        limit = max_length or self.inner.model_max_length
        self.readings.append(Reading.of_probe(self.inner, prompt[0], limit))
        tokens = torch.ones(len(prompt), limit if limit < NO_LIMIT else 1, dtype=torch.long)
        return BatchEncoding({"input_ids": tokens, "attention_mask": tokens})


def readings_of(path, family, networks, max_sequence_length=None, **where):
    """The [`Reading`]s of a pipeline: its `encode_prompt` runs once, on networks without contents.

    Args:
        path: folder or Hub id of the pipeline; `where`: arguments of `from_pretrained`.
        family (a subclass of [`Family`]).
        networks: by name, on the meta device; the text encoders and the denoiser are looked at.

    Returns:
        A list; None if its tokenizers are not there (of an architecture alone).
    """
    index = read_index(path, **where)
    names = [name.replace("text_encoder", "tokenizer") for name in networks if name.startswith("text_encoder")]
    if index.get("processor", [None])[0]:  # it holds the tokenizer
        names = ["processor"]
    if not all(index.get(name, [None])[0] for name in names):
        return None
    if Path(path).is_dir() and not all((Path(path) / name).is_dir() for name in names):
        return None
    readings, fake = [], FakeTensorMode(allow_non_fake_inputs=True)
    parts = dict.fromkeys(OneStepPipeline._optional_components)
    for name in names:
        parts[name] = Heard(class_of(*index[name]).from_pretrained(path, subfolder=name, **where), readings)
    parts |= {k: hollow(v, torch.float32, fake) for k, v in networks.items() if k.startswith("text_encoder")}
    config = SimpleNamespace(max_sequence_length=max_sequence_length or family.max_sequence_length)
    pipe = SimpleNamespace(**parts, config=config, denoiser=networks[family.denoiser])
    with torch.no_grad():
        family.encode_prompt(pipe, [PROBE])
    return readings


class Cut:
    """Counts the prompts that no text encoder of a generator reads whole; the first 200,000 are looked at.

    Args:
        readings: from `readings_of`.
        rewards: [`RewardSpec`]s that are trained on.

    Attributes:
        counted, cut (`int`): prompts.
        tokens (`int`): that the encoder which reads most takes of a prompt; `longest`: of the longest prompt.
        first (`str`): place, or beginning, of the first prompt that is cut.
    """

    def __init__(self, readings, rewards=()):
        self.readings, self.rewards, self.waiting = readings or [], rewards, []
        self.counted, self.cut, self.longest, self.first = 0, 0, 0, None
        if self.readings:
            tokens = [reading.limit - reading.around for reading in self.readings]
            self.tokens = max(tokens)
            self.widest = tokens.index(self.tokens)
            self.around = self.readings[self.widest].around

    @classmethod
    def of(cls, models, args=None):
        """Of [`Models`], and of the rewards that arguments name."""
        source, rewards = models.reference, () if args is None else read_rewards(args)[0]
        return cls(readings_of(source.path, models.family, models.networks, **source.where), rewards)

    def add(self, prompt, place=None):
        if self.readings and self.counted + len(self.waiting) < MOST:
            self.waiting.append((prompt, place))
            if len(self.waiting) == AT_A_TIME:
                self.look()

    def look(self):
        """Count those that wait."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        lengths = [reading.lengths([prompt for prompt, _ in waiting]) for reading in self.readings]
        self.counted += len(waiting)
        self.longest = max(self.longest, max(lengths[self.widest]) - self.around)
        for (prompt, place), *each in zip(waiting, *lengths):
            if all(length > reading.limit for length, reading in zip(each, self.readings)):
                self.cut += 1
                self.first = self.first or place or ascii(prompt[:40])

    def __str__(self):
        """A line if a prompt is cut, which also says what rewards read more of it; else empty."""
        self.look()
        if not self.cut:
            return ""
        line = (
            f"{self.cut:,} of {self.counted:,} prompts ({self.cut / self.counted:.0%}) are longer than the "
            f"{self.tokens} tokens that the text encoder reads; the longest has {self.longest} (first {self.first})"
        )
        more = [spec.label for spec in self.rewards if self.read_by(spec) > self.tokens]
        if not more:
            return line
        verb = "reads" if len(more) == 1 else "read"
        return f"{line}: the reward {', '.join(more)} {verb} more, and asks for what the generator cannot know"

    def read_by(self, spec):
        """Tokens of the longest prompt that a reward reads; one's own function is given it whole."""
        tokens = spec.published and spec.published.tokens
        return self.longest if tokens is None else tokens

    def as_dict(self):
        """For summaries; None if nothing could be counted."""
        self.look()
        if not self.counted:
            return None
        return {"counted": self.counted, "cut": self.cut, "tokens": self.tokens, "longest": self.longest}
