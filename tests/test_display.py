"""Grids, the stepper and the loss curve."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from course_utils import display


@pytest.fixture(autouse=True)
def no_window() -> None:
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_show_draws_each_image_under_its_title() -> None:
    images = torch.rand(5, 3, 8, 8)
    display.show(images, list("abcde"), columns=3)
    drawn = [axis for axis in plt.gcf().axes if axis.images]
    assert [axis.get_title() for axis in drawn] == list("abcde")
    shown = torch.from_numpy(drawn[3].images[0].get_array().data)
    torch.testing.assert_close(shown, images[3].permute(1, 2, 0))


def test_show_names_its_rows() -> None:
    display.show(torch.rand(6, 3, 8, 8), columns=3, rows=["first", "second"])
    named = {i: axis.texts[0].get_text() for i, axis in enumerate(plt.gcf().axes) if axis.texts}
    assert named == {0: "first", 3: "second"}
    with pytest.raises(ValueError, match="zip"):
        display.show(torch.rand(6, 3, 8, 8), columns=3, rows=["first"])


def test_show_takes_one_image_and_bytes_and_clips() -> None:
    display.show(torch.full((3, 8, 8), 128, dtype=torch.uint8))
    assert plt.gcf().axes[0].images[0].get_array().max() == pytest.approx(128 / 255)
    display.show(torch.full((3, 8, 8), 7.0))
    assert plt.gcf().axes[0].images[0].get_array().max() == 1


@pytest.mark.parametrize("shape", [(8, 8), (2, 1, 8, 8), (8, 8, 3)])
def test_show_names_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not \\(" + ", ".join(map(str, shape))):
        display.show(torch.zeros(shape))


def test_stepper_draws_each_step_once() -> None:
    calls = []

    def draw(step: int) -> plt.Figure:
        calls.append(step)
        figure, axis = plt.subplots(figsize=(1, 1))
        axis.plot([0, step])
        return figure

    box = display.stepper(draw, 3)
    (play, slider), picture = box.children[0].children, box.children[1]
    first = picture.value
    slider.value = 3
    assert picture.value != first and bytes(picture.value).startswith(b"\x89PNG")
    slider.value = 0
    assert picture.value == first and calls == [0, 3]
    assert (play.max, slider.max) == (3, 3) and not plt.get_fignums()


def test_loss_curve_follows_the_run(monkeypatch) -> None:
    shown = []
    handle = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(display, "display", lambda figure, display_id: handle)
    curve = display.LossCurve(every=10)
    history = [{"loss": 1 / (step + 1)} for step in range(30)]
    for step in (10, 15, 20, 30):
        curve(SimpleNamespace(step=step, steps=40, seconds=1.0, history=history[:step]))
    assert [len(figure.axes[0].lines[0].get_xdata()) for figure in shown] == [10, 20, 30]
    assert [len(figure.axes[0].lines) for figure in shown] == [1, 1, 2]  # a mean of 20 needs more than 20
    curve(SimpleNamespace(step=25, steps=25, seconds=1.0, history=history[:25]))
    assert len(shown[-1].axes[0].lines[0].get_xdata()) == 25  # the end is drawn, whatever `every` says


def test_a_picture_is_kept_only_when_asked_for(monkeypatch, tmp_path) -> None:
    (tmp_path / "notebooks" / "pictures").mkdir(parents=True)
    monkeypatch.setattr(display, "ROOT", tmp_path)
    plt.figure()
    monkeypatch.delenv("COURSE_RETRAIN", raising=False)
    display.save_picture("lesson")
    assert not list(tmp_path.rglob("*.png"))
    monkeypatch.setenv("COURSE_RETRAIN", "1")
    display.save_picture("lesson")
    assert (tmp_path / "notebooks" / "pictures" / "lesson.png").exists()
