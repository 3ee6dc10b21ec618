import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all is imported and stays: see below

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from diff_instruct.evaluation.pictures import draw_reference  # noqa: E402
from diff_instruct.training.history import History  # noqa: E402
from tests.runs import QUICK  # noqa: E402
from tests.tiny import PROMPTS, tiny_checkpoints, tiny_pixart, tiny_scorer  # noqa: E402


torch.set_num_threads(1)  # tiny networks are faster so


def pytest_collection_finish():
    """What was imported never goes again: no collection looks through these millions of objects any more."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny PixArtAlphaPipeline."""
    return tiny_pixart(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def tiny_pocket(tmp_path_factory):
    """Folder with two tiny scorers, laid out as `pocket/`."""
    folder = tmp_path_factory.mktemp("pocket")
    for seed, name in enumerate(("scorer", "scorer_heldout")):
        (folder / name).mkdir()
        tiny_scorer(folder / name, seed)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """No test looks at what lies in the checkout, such as the folder that the README's first command writes."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    """accelerate keeps its settings in the process; each test starts without them, and stays with one thread."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def curves_drawn():
    """For tests of runs that draw `curves.png`."""


@pytest.fixture
def reference_drawn():
    """For tests of runs that draw the reference in all of its steps."""


@pytest.fixture(autouse=True)
def drawn_in_short(request, monkeypatch):
    """Curves and the reference's 25 steps take half of a tiny run: most runs do without."""
    if "curves_drawn" not in request.fixturenames:
        monkeypatch.setattr(History, "plot", lambda self, file: file.touch())
    if "reference_drawn" not in request.fixturenames:
        monkeypatch.setattr(draw_reference, "__defaults__", (2,))


@pytest.fixture
def tiny_args(tmp_path, tiny_model, tiny_pocket):
    """Arguments of a run of a few steps on the tiny model; more can be appended."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return [
        "--pretrained_model_name_or_path", tiny_model, "--train_prompts", str(prompts), "--eval_prompts", str(prompts),
        "--reward", "pocket", "--heldout_reward", "pocket_heldout", "--output_dir", str(tmp_path / "out"),
        "--reward_checkpoint", *tiny_checkpoints(tiny_pocket),
        "--train_batch_size", "2", "--max_train_steps", "4", "--num_eval_images", "2", "--num_eval_prompts", "3",
        "--learning_rate", "1e-3", "--logging_steps", "1", "--validation_steps", "2", "--checkpointing_steps", "2",
    ]  # fmt: skip


@pytest.fixture
def quick_args(tiny_args):
    """The same, judging and drawing as little as can be."""
    return [*tiny_args, *QUICK]
