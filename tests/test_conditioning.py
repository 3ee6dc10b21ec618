"""c of prompts: every prompt encoded once, alike whatever it is encoded with, in memory and in files."""

import json
import logging
import os
import time

import pytest
import torch
from safetensors import safe_open

from diff_instruct.mistake import Mistake
from diff_instruct.prompts import cache as module
from diff_instruct.prompts.cache import PromptCache, encode_ahead, encoder_key
from diff_instruct.prompts.conditioning import Conditioning, Memory, nbytes, on_device
from diff_instruct.training.arguments import parse_args
from pipeline_one_step import OneStepPipeline
from tests.processes import CONTEXT
from tests.runs import run, same, weights
from tests.tiny import PROMPTS, tiny_clip, tiny_pixart, tiny_tokenizer


class Encoder:
    """Random but fixed c of a prompt, of every kind; counts the rows and says what it was called with."""

    def __init__(self, mask=None):
        self.mask, self.calls = mask, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        rows = []
        for prompt in prompts:
            rng = torch.Generator().manual_seed(sum(map(ord, prompt)))
            states, pooled = torch.randn(8, 4, generator=rng), torch.randn(8, generator=rng)  # 8 as there are tokens
            rows.append({"encoder_hidden_states": states.bfloat16(), "text_embeds": pooled})
            if self.mask is not None:
                length = min(len(prompt) + 1, 8)
                rows[-1]["encoder_attention_mask"] = (torch.arange(8) < length).to(self.mask)
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


@pytest.mark.parametrize("mask", [torch.int64, torch.bool, torch.float32, None])
def test_padding_is_cut_where_a_mask_says_so(mask):
    """An integer mask leaves it out; a mask that is added, or none, means that it is attended to."""
    raw, c = Encoder(mask)(["abc", "d"]), Conditioning(Encoder(mask), "cpu")(["abc", "d"])
    if mask in (None, torch.float32):
        assert same(c, raw)
    else:
        assert torch.equal(c["encoder_attention_mask"], raw["encoder_attention_mask"][:, :4])
        assert torch.equal(c["encoder_hidden_states"][0], raw["encoder_hidden_states"][0, :4])
        assert torch.equal(c["encoder_hidden_states"][1, :2], raw["encoder_hidden_states"][1, :2])
        assert not c["encoder_hidden_states"][1, 2:].any()
        assert torch.equal(c["text_embeds"], raw["text_embeds"])  # (B, D), although D is the number of tokens


def test_a_mask_with_holes_is_cut_after_its_last_token():
    def encode(prompts):
        mask = torch.tensor([[1, 0, 1, 0]] * len(prompts))
        return {"encoder_hidden_states": torch.ones(len(prompts), 4, 2), "encoder_attention_mask": mask}

    assert Conditioning(encode, "cpu")(["a"])["encoder_attention_mask"].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("batch_size, rows", [(1, [1, 1, 1, 1]), (2, [2, 2, 2]), (4, [4, 4])])
def test_only_what_is_new_is_encoded(batch_size, rows):
    encoder = Encoder(torch.int64)
    encode = Conditioning(encoder, "cpu", batch_size)
    c = encode(["a", "bcd", "a", "ef"])
    assert same(c, Conditioning(Encoder(torch.int64), "cpu")(["a", "bcd", "a", "ef"]))
    encode(["ef", "a"])
    null = encode([""])
    assert [len(call) for call in encoder.calls] == rows
    assert set(encoder.calls[-1]) == {""} and len(null["encoder_hidden_states"]) == 1  # ∅ is alone in its batch


def test_memory_is_bounded():
    encoder = Encoder()
    encode = Conditioning(encoder, "cpu", store=Memory(max_bytes=2 * (8 * 4 * 2 + 8 * 4)))
    expected = Conditioning(Encoder(), "cpu")(["a", "b", "c"])
    for _ in range(2):
        assert same(encode(["a", "b", "c"]), expected)
    assert len(encode.store.rows) == 2 and encode.store.bytes <= encode.store.max_bytes
    assert [call[0] for call in encoder.calls] == ["a", "b", "c", "a"]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("cls", ["clip", "t5"])
def test_an_embedding_does_not_depend_on_the_others(tiny_model, batch_size, cls):
    """Bit for bit, in a resumed run, too, which meets the prompts in other company."""
    if cls == "clip":
        (tokenizer, network), options = tiny_clip(), {"padding": "max_length", "truncation": True}
    else:
        from transformers import T5EncoderModel

        tokenizer, options = tiny_tokenizer(), {"padding": "max_length", "truncation": True}
        network = T5EncoderModel.from_pretrained(tiny_model, subfolder="text_encoder")

    def encode_prompt(prompts):
        tokens = tokenizer(prompts, return_tensors="pt", **options)
        return {"encoder_hidden_states": network(**tokens)[0], "encoder_attention_mask": tokens.attention_mask}

    together = Conditioning(encode_prompt, "cpu", batch_size)
    together.prepare(PROMPTS)
    for prompt in PROMPTS:
        alone = Conditioning(encode_prompt, "cpu", batch_size)
        assert same(alone([prompt]), together([prompt]))


def test_text_encoders_come_to_the_device_only_for_new_prompts():
    class Network:
        place, moves = "cpu", []

        def to(self, device):
            self.place = device
            self.moves.append(device)

    network, encoder = Network(), Encoder()

    def encode_prompt(prompts):
        assert network.place == "cuda"
        return encoder(prompts)

    encode = Conditioning(encode_prompt, "cpu", encoding=lambda: on_device([network], "cuda"))
    for prompts in (["a", "b"], ["a"], ["b", "a"]):
        encode(prompts)
    assert network.moves == ["cuda", "cpu"]
    network.to("cuda")
    with pytest.raises(AssertionError), on_device([network], "meta"):
        encode_prompt(["c"])
    assert network.place == "cpu"  # after an error, too


def test_a_second_run_never_encodes(tmp_path):
    encoder = Encoder(torch.int64)
    first = Conditioning(encoder, "cpu", store=PromptCache(tmp_path, "key", max_rows=3))
    prompts = ["", *PROMPTS]
    c = first(prompts)
    assert same(first(prompts), c) and len(encoder.calls) == len(prompts)  # two files are written, two rows are not
    first.flush()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3 and not list(tmp_path.glob("*/*.partial"))
    second = Conditioning(None, "cpu", store=PromptCache(tmp_path, "key"))
    assert same(second(prompts), c) and same(second(prompts[::-1]), first(prompts[::-1]))
    assert len(second.store) == len(prompts) and "never seen" not in second.store


def test_another_key_is_another_cache(tmp_path):
    Conditioning(Encoder(), "cpu", store=PromptCache(tmp_path, "one", max_rows=1))(["a"])
    assert PromptCache(tmp_path, "two").get("a") is None and PromptCache(tmp_path, "one").get("a") is not None
    assert sorted(file.read_text() for file in tmp_path.glob("*/key.txt")) == ["one\n", "two\n"]


def test_what_another_process_wrote_is_found(tmp_path):
    one, two = (PromptCache(tmp_path, "key", max_rows=1) for _ in range(2))
    assert two.get("a") is None
    time.sleep(0.01)  # the clock of files
    Conditioning(Encoder(), "cpu", store=one)(["a", "b"])
    assert "b" in two and same(two.get("a"), one.get("a"))


def test_rows_are_mapped_and_few_files_are_open(tmp_path):
    store = PromptCache(tmp_path, "key", max_rows=1)
    encode = Conditioning(Encoder(), "cpu", store=store)
    prompts = [f"prompt {i}" for i in range(100)]
    encode.prepare(prompts)
    assert not store.gathered and same(encode(prompts), Conditioning(Encoder(), "cpu")(prompts))
    assert len(store.opened) == 64 and len(store) == 100


def encode_number(prompts):
    return {"text_embeds": torch.tensor([[int(prompt)] * 100 for prompt in prompts])}


def write_numbers(folder, first):
    """Until it is killed, or its tests are."""
    encode, parent = Conditioning(encode_number, "cpu", store=PromptCache(folder, "key", max_rows=4)), os.getppid()
    while os.getppid() == parent:
        encode.prepare([str(first)])
        first += 1


def test_killed_writers_leave_whole_files(tmp_path):
    """Three processes write, partly the same prompts, and are killed at any moment."""
    writers = [CONTEXT.Process(target=write_numbers, args=(tmp_path, first)) for first in (0, 0, 50)]
    for writer in writers:
        writer.start()
    deadline = time.time() + 60
    while len(list(tmp_path.glob("*/*.safetensors"))) < 60 and time.time() < deadline:
        time.sleep(0.01)
    for writer in writers:
        writer.kill()
        writer.join()
    store = PromptCache(tmp_path, "key")
    assert len(store) >= 60
    found = [i for i in range(100_000) if str(i) in store]
    assert len(found) == len(store)
    c = Conditioning(None, "cpu", store=store)([str(i) for i in found])
    assert torch.equal(c["text_embeds"], torch.tensor(found)[:, None].expand(-1, 100))


def test_a_kill_inside_a_write_leaves_nothing(tmp_path, monkeypatch):
    encode = Conditioning(Encoder(), "cpu", store=PromptCache(tmp_path, "key", max_rows=1))
    encode(["a"])

    def killed(tensors, file, metadata):
        file.write_bytes(b"part")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(["b"])
    store = PromptCache(tmp_path, "key")
    assert "a" in store and "b" not in store and len(store) == 1


def test_leftovers_of_a_kill_are_removed_after_an_hour(tmp_path):
    folder = PromptCache(tmp_path, "key").folder
    (folder / "old.partial").write_text("")
    (folder / "new.partial").write_text("")
    os.utime(folder / "old.partial", (time.time() - 4000,) * 2)
    PromptCache(tmp_path, "key")
    assert sorted(f.name for f in folder.iterdir()) == ["key.txt", "new.partial"]


def test_a_damaged_file_is_named(tmp_path):
    Conditioning(Encoder(), "cpu", store=PromptCache(tmp_path, "key", max_rows=1))(["a"])
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Mistake, match=f"{file} is damaged .*: delete it"):
        PromptCache(tmp_path, "key")
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="--prompt_cache .* cannot be written"):
        PromptCache(tmp_path / "file", "key")


def test_a_full_disk_ends_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    store = PromptCache(tmp_path, "key", max_rows=2)
    encode = Conditioning(Encoder(), "cpu", store=store)
    encode(["a", "b"])

    def full(tensors, file, metadata):
        file.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    expected = Conditioning(Encoder(), "cpu")
    for _ in range(3):
        assert same(encode(["a", "b", "c", "d", "e"]), expected(["a", "b", "c", "d", "e"]))
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left" in warnings[0].getMessage()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1 and not list(tmp_path.glob("*/*.partial"))


def test_encode_ahead_shares_the_prompts(tmp_path):
    encoders = []
    for rank in range(2):
        encoders.append(Encoder())
        store = PromptCache(tmp_path, "key")
        encode_ahead(Conditioning(encoders[rank], "cpu", store=store), iter(PROMPTS), rank, 2, total=len(PROMPTS))
    assert [len(encoder.calls) for encoder in encoders] == [4, 3]
    assert len(Conditioning(None, "cpu", store=PromptCache(tmp_path, "key"))(PROMPTS)["text_embeds"]) == len(PROMPTS)


def test_the_key_tells_encoders_apart(tmp_path):
    from transformers import T5EncoderModel

    def key(seed, dtype=torch.float32, *settings):
        folder = tiny_pixart(tmp_path / str(seed), seed)
        network = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
        return encoder_key({"tokenizer": tiny_tokenizer(), "text_encoder": network, "vae": None}, *settings)

    keys = [key(0), key(1), key(0, torch.bfloat16), key(0, torch.float32, "max_sequence_length 77")]
    assert len(set(keys)) == 4 and key(0) == keys[0] and json.loads(keys[0])["text_encoder"]
    clip = tiny_clip()
    assert encoder_key({"tokenizer": clip[0]}) != encoder_key({"tokenizer": tiny_tokenizer()})


def test_bytes_a_prompt(tmp_path):
    """What is written beside the embeddings is below 300 bytes a prompt with two tensors."""
    store = PromptCache(tmp_path, "key")
    encode = Conditioning(Encoder(), "cpu", store=store)
    encode.prepare(f"prompt {i}" for i in range(256))
    (file,) = tmp_path.glob("*/*.safetensors")
    with safe_open(file, "pt") as f:
        assert len(f.keys()) == 512
    assert file.stat().st_size / 256 < nbytes(store.get("prompt 7")) + 300


def test_the_flags(tmp_path):
    args = parse_args(["--prompt_cache", "cache", "--offload_text_encoder", "--output_dir", str(tmp_path)])
    assert args.prompt_cache == "cache" and args.offload_text_encoder


def test_a_run_with_a_cache_encodes_nothing_twice(tiny_args, tmp_path, monkeypatch):
    """All prompts before the first step; a second run finds them; and the weights are those without a cache."""
    calls, encode = [], OneStepPipeline.encode_prompt
    monkeypatch.setattr(OneStepPipeline, "encode_prompt", lambda self, p: (calls.extend(p), encode(self, p))[1])
    run([*tiny_args, "--output_dir", tmp_path / "plain"])
    for name, options in (
        ("first", ["--prompt_cache", tmp_path / "cache"]),
        ("second", ["--prompt_cache", tmp_path / "cache"]),
        ("offloaded", ["--offload_text_encoder"]),
    ):
        calls.clear()
        run([*tiny_args, *options, "--output_dir", tmp_path / name])
        assert same(weights(tmp_path / "plain"), weights(tmp_path / name))
        assert len(calls) == len(set(calls)) and bool(calls) == (name != "second")
