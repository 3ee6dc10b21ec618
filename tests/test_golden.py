"""`tests/parity/golden_image_reward.py` runs to its end, and says in one line what it lacks."""

import random
from urllib.error import URLError

import pytest
from PIL import Image

from tests.parity import golden_image_reward as golden
from tests.parity.reward_inputs import ORACLE
from tests.parity.reward_ours import load_saved


@pytest.fixture
def pictures(tmp_path):
    for i in range(1, 5):
        Image.frombytes("RGB", (48, 40), random.Random(i).randbytes(48 * 40 * 3)).save(tmp_path / f"{i}.webp")
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    """(status or error line, what was printed)."""
    monkeypatch.setattr("sys.argv", ["golden_image_reward.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        golden.main()
    return stop.value.code, capsys.readouterr().out


def test_it_tells_the_published_scores_from_others(pictures, monkeypatch, capsys):
    reward, paths = load_saved("image_reward_tiny", ORACLE / "image_reward_tiny"), []
    monkeypatch.setattr(golden, "load_reward", lambda spec, trained: paths.append(spec.checkpoint) or reward)
    mine = pictures / "mine.pt"
    mine.touch()
    arguments = ["--images", pictures, "--reward_checkpoint", f"image_reward={mine}"]
    status, printed = run(monkeypatch, capsys, *arguments)
    assert status == 1 and "| 4.webp | -2.02957 |" in printed and "NOT the published scores" in printed
    scores = [reward(golden.read_picture(pictures / name), [golden.PROMPT]).item() for name in golden.GOLDEN]
    for shift, expected in ((0.005, 0), (0.02, 1)):
        monkeypatch.setattr(golden, "GOLDEN", {n: s + shift for n, s in zip(golden.GOLDEN, scores)})
        assert run(monkeypatch, capsys, *arguments)[0] == expected
    assert paths == [str(mine)] * 3


def test_without_network_it_says_so_in_one_line(pictures, monkeypatch, capsys):
    def no_network(request, timeout):
        raise URLError("Name or service not known")

    monkeypatch.setattr(golden, "urlopen", no_network)
    monkeypatch.setattr(golden.constants, "HF_HUB_OFFLINE", False)
    lacking = (([], "--images FOLDER"), (["--images", pictures], "--reward_checkpoint image_reward=PATH"))
    for arguments, flag in lacking:
        line, printed = run(monkeypatch, capsys, *arguments)
        assert line.startswith("error: https://") and "Name or service not known" in line and line.endswith(flag)
        assert "\n" not in line and printed == ""


def test_a_missing_picture_is_named(pictures, monkeypatch, capsys):
    (pictures / "3.webp").unlink()
    line, _ = run(monkeypatch, capsys, "--images", pictures)
    assert line.startswith("error: --images: ") and "3.webp is no picture" in line and "\n" not in line
