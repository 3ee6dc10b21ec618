"""What a run tells when it goes wrong, and where it arrives."""

import sys
from types import SimpleNamespace

from diff_instruct.training.alerts import Alerts, send
from diff_instruct.training.history import History


ROWS = [
    (0, {"val_heldout": 1.0, "val_diversity": 0.10}, []),
    (1, {"x0_std": 1.0, "skipped_steps": 0}, []),
    (2, {"x0_std": 1.5, "skipped_steps": 2}, ["Gradients that are not finite", "x0 drifts"]),
    (3, {"x0_std": 1.6, "skipped_steps": 2}, []),  # still outside: told once
    (4, {"val_heldout": 1.2, "val_diversity": 0.095}, []),
    (5, {"x0_std": 1.0, "val_heldout": 1.1, "val_diversity": 0.089},
     ["Held-out score below its best", "Diversity below 90% of the start"]),
    (6, {"x0_std": 0.6, "val_heldout": 1.3}, ["x0 drifts"]),  # over, and begun again
    (7, {"val_heldout": 1.2}, ["Held-out score below its best"]),
]  # fmt: skip


def test_each_condition_is_told_when_it_begins():
    alerts = Alerts()
    for step, row, titles in ROWS:
        begun = alerts(step, row)
        assert [title for title, _ in begun] == titles
        assert all(text.startswith(f"step {step}: ") for _, text in begun)


def test_trackio_gets_them_and_other_trackers_do_not(monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(alert=lambda title, text: told.append((title, text))))
    for name, expected in (("tensorboard", []), ("trackio", [("a", "b")])):
        send(SimpleNamespace(trackers=[SimpleNamespace(name=name)]), [("a", "b")])
        assert told == expected


def test_a_resumed_run_does_not_tell_again(tmp_path):
    accelerator = SimpleNamespace(trackers=[], log=lambda *args, **kwargs: None)
    history = History(tmp_path)
    for step, row, _ in ROWS[:4]:
        history.log(accelerator, step, row)
    resumed = History(tmp_path, 3)
    assert resumed.alerts(4, {"x0_std": 1.6, "skipped_steps": 2}) == []
    assert [title for title, _ in resumed.alerts(4, {"skipped_steps": 3})] == ["Gradients that are not finite"]


def test_a_curve_of_one_figure_is_seen(tmp_path, monkeypatch, curves_drawn):
    """As of a run with one logged step: a line of one point shows only with a marker."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file: drawn.append(figure))
    history = History(tmp_path)
    for step, figures in ((0, {"val_reward": 1.0, "ta_loss": 2.0}), (2, {"norm_cfg": 3.0, "ta_loss": 4.0})):
        history.rows.append({"step": step, **figures})
    history.plot(tmp_path / "curves.png")
    lines = {line.get_label(): line for axis in drawn[0].axes for line in axis.get_lines()}
    assert lines.keys() == {"reward", "ta_loss", "norm_cfg"}
    assert [lines[name].get_marker() for name in ("ta_loss", "norm_cfg")] == ["None", "."]
