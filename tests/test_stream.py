"""The endless order of prompts: complete, shared by processes, continued exactly, read again when it breaks."""

import json
import threading
from itertools import islice

import pytest
import torch
from datasets import IterableDataset

from diff_instruct.mistake import Mistake
from diff_instruct.prompts import stream as module
from diff_instruct.prompts.files import PromptSource, open_prompts
from diff_instruct.prompts.stream import PromptStream, Sampler, StreamBroken


def numbered(folder, n=100, files=1):
    """n prompts in so many files."""
    for i in range(files):
        rows = range(i, n, files)
        (folder / f"{i:02d}.txt").write_text("\n\n".join(f"prompt {j}" for j in rows) + "\n")  # with blank lines
    return open_prompts(PromptSource(str(folder)))


def test_shuffled_anew_in_each_epoch_and_complete(tmp_path):
    stream = PromptStream(numbered(tmp_path), seed=0, buffer_size=50)
    epochs = [list(islice(stream, 100)) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"prompt {i}" for i in range(100))
    assert epochs[0] != epochs[1] and epochs[0] != [f"prompt {i}" for i in range(100)]


@pytest.mark.parametrize("n, files", [(1, 1), (7, 1), (7, 3), (24, 8), (101, 5)])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_epochs_by_position(tmp_path, n, files, world):
    """Four epochs and a bit, whatever the numbers of prompts and files."""
    dataset = numbered(tmp_path, n, files)
    each = (4 * n + 5) // world + 1
    together = list(islice(PromptStream(dataset, 0, 50), each * world))
    for rank in range(world):
        alone = list(islice(PromptStream(dataset, 0, 50, rank, world), each))
        assert alone == together[rank::world]


def test_several_files_are_read_without_threads(tmp_path):
    """Those of `datasets` wait for each other for ever if an iterator is left while another one starts."""
    streams = [PromptStream(numbered(tmp_path, 40, 4), seed, 20) for seed in range(3)]
    for stream in streams:
        list(islice(stream, 5))
        assert not [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("taken", [6, 48, 102])
def test_continues_exactly_with_any_number_of_processes(tmp_path, taken, before, after):
    dataset = numbered(tmp_path, 51, 3)
    together = list(islice(PromptStream(dataset, 3, 20), 300))[taken:]
    states = []
    for rank in range(before):
        stream = PromptStream(dataset, 3, 20, rank, before)
        assert len(list(islice(stream, taken // before))) == taken // before
        stream.read_ahead(11)  # does not count as drawn
        states.append(stream.state_dict())
    assert all(state == states[0] for state in states)
    for rank in range(after):
        stream = PromptStream(dataset, 3, 20, rank, after)
        stream.load_state_dict(json.loads(json.dumps(states[0])))
        assert list(islice(stream, 40)) == together[rank::after][:40]


@pytest.mark.parametrize("n, files", [(100, 1), (9, 4)])
def test_two_processes_draw_what_one_draws(tmp_path, n, files):
    """Batch b on two ranks: the same prompts with the same noise as batch 2b on one, over several epochs."""
    dataset = numbered(tmp_path, n, files)

    def draws(rank, world, batch):
        sampler = Sampler(PromptStream(dataset, 0, 50, rank, world), [(1, 2, 2)], batch, 5, rank, world)
        return [sampler() for _ in range(6)], sampler.state_dict()

    one, state = draws(0, 1, 8)
    first, state_0 = draws(0, 2, 4)
    second, state_1 = draws(1, 2, 4)
    assert state == state_0 == state_1
    for whole, even, odd in zip(one, first, second):
        assert whole.prompts == [p for pair in zip(even.prompts, odd.prompts) for p in pair]
        for name in ("z", "eps", "u", "step"):
            a, b, c = (getattr(draw, name) for draw in (whole, even, odd))
            assert torch.equal(a, torch.stack([b, c], dim=1).flatten(0, 1))


def test_a_sampler_continues_with_another_number_of_processes(tmp_path):
    dataset = numbered(tmp_path, 9, 2)
    one = Sampler(PromptStream(dataset, 0, 50), [(1, 2, 2)], 4, 5)
    one()
    expected = [one(), one()]
    half = Sampler(PromptStream(dataset, 0, 50, 1, 2), [(1, 2, 2)], 2, 5, 1, 2)
    half()
    again = Sampler(PromptStream(dataset, 0, 50), [(1, 2, 2)], 8, 5)
    again.load_state_dict(half.state_dict())
    draw = again()
    assert draw.prompts == expected[0].prompts + expected[1].prompts
    assert torch.equal(draw.z, torch.cat([expected[0].z, expected[1].z]))


RESET = OSError("connection reset")


def breaking(failures, at=5, n=20, error=RESET):
    """n prompts, of which the one at `at` cannot be reached the first so many times."""
    left = [failures]

    def rows(shards):
        for i in range(n):
            if i == at and left[0] > 0:
                left[0] -= 1
                raise error
            yield {"text": f"prompt {i}"}

    return IterableDataset.from_generator(rows, gen_kwargs={"shards": [0]})


@pytest.fixture
def waits(monkeypatch):
    """The seconds that a stream would have waited."""
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("error", [OSError("reset"), RuntimeError("a library's own")])
def test_a_stream_that_breaks_is_read_again(waits, caplog, error):
    expected = list(islice(PromptStream(breaking(0), 0, 4), 45))
    assert waits == []
    assert list(islice(PromptStream(breaking(4, error=error), 0, 4), 45)) == expected
    assert waits == [1, 4, 16, 64] and "next attempt in 64 s" in caplog.text


def test_a_stream_that_stays_broken(waits):
    """One error in the end; what was drawn stays as it is, and the run goes on from there later."""
    together = list(islice(PromptStream(breaking(0, at=15), 0, 4), 30))
    stream = PromptStream(breaking(99, at=15), 0, 4, 0, 2)
    drawn = [next(stream) for _ in range(3)]
    assert drawn == together[0:6:2]
    with pytest.raises(StreamBroken, match="OSError: connection reset.*after 5 attempts") as error:
        stream.read_ahead(10)
    assert isinstance(error.value.__cause__, OSError) and waits == [1, 4, 16, 64, 256]
    again = PromptStream(breaking(0, at=15), 0, 4)
    again.load_state_dict(stream.state_dict())
    assert next(stream) == together[6]  # what was read before it broke is still there
    assert [next(again) for _ in range(3)] == together[6:9]


def test_a_step_reads_its_prompts_before_it_begins(waits):
    sampler = Sampler(PromptStream(breaking(99, at=15), 0, 4), [(1, 2, 2)], 3, 5)
    sampler.read_ahead(2)
    with pytest.raises(StreamBroken):
        sampler.read_ahead(99)
    sampler(), sampler()
    assert sampler.state_dict() == {"drawn": 6, "prompts": {"epoch": 0, "position": 6}}


def test_a_source_that_became_useless_is_a_mistake(tmp_path, waits):
    dataset = numbered(tmp_path, 5)
    (tmp_path / "00.txt").write_text("\n\n")
    with pytest.raises(Mistake, match="none that can be used: 2 blank lines; the first: 00.txt:1"):
        next(PromptStream(dataset, 0, 10))
    assert waits == []
