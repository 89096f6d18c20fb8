"""Figures: names in any script are drawn, shortened, apart from each other; epochs are whole."""
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from lab import figures

LONG = "a name of sixty characters that goes on and on until it ends"
NAMES = ["金鱼", "سمكة ذهبية", "🐟 fish", LONG, "W" * 60, r"$\frac$ cost", "_under", "tab\tline\n",
         "not \udcff decoded"]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are saved; they are laid out, which looks up every glyph, but not painted."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **options: kept.append(self) or
                        self.draw_without_rendering())
    return kept


def width(figure, text, size):
    """In points, as the renderer lays it out."""
    artist = Text(0, 0, text, fontsize=size, family=figures.typefaces()[0])
    artist.set_figure(figure)
    return artist.get_window_extent().width * 72 / figure.dpi


def test_names_of_any_script_and_length_stand_apart_below_their_images(drawn, tmp_path):
    """Warnings are errors: a character without a glyph would be one."""
    n = len(NAMES)
    answers, labels = [k % n for k in range(24)], [(k + k // n) % n for k in range(24)]
    history = [dict(epoch=1, loss=0.5, feedback=0.1, train_error=50, test_error=60)]
    figures.draw_run(history, torch.rand(24, 1, 8, 8), answers, labels, NAMES, tmp_path / "run.png")
    axes = drawn[0].axes[2:]
    captions = [axis.xaxis.label for axis in axes]
    for label, answer, true in zip(captions, answers, labels, strict=True):
        assert label.get_text().count("\n") == (answer != true)
        assert (label.get_color() == "black") == (answer == true)
    boxes = [artist.get_window_extent() for artist in (*axes, *captions)]
    assert len(boxes) == 48
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    for image, text in zip(boxes[:24], boxes[24:], strict=True):
        assert image.y0 - 12 < text.y1 <= image.y0
        assert abs(text.x0 + text.x1 - image.x0 - image.x1) < 2        # centred


def test_curves_show_a_divergence_where_there_is_one(drawn, tmp_path):
    for last, names in ((0.1, ["loss", "feedback"]), (0.0, ["loss"])):
        history = [dict(epoch=epoch, loss=0.5, feedback=feedback, train_error=50, test_error=60)
                   for epoch, feedback in ((1, 0.0), (2, last))]
        figures.draw_run(history, (), (), (), (), tmp_path / "run.png")
        lines, shown = drawn[-1].axes[0].get_legend_handles_labels()
        assert shown == names and [*lines[-1].get_ydata()] == ([0.0, last] if last else [0.5, 0.5])


def test_legible_words_are_the_user_s_where_a_typeface_has_them(monkeypatch):
    assert figures.legible("naïve café_1 (x)") == "naïve café_1 (x)"
    assert figures.legible("a\nb") == r"a\nb" and figures.legible("$5") == r"\$5"
    family, known = figures.typefaces()
    assert family[0] == "DejaVu Sans" and {ord("a"), ord("é"), ord("ж")} <= known
    for has, shown in ((known - {0x91d1}, r"\u91d1x"), (known | {0x91d1}, "金x")):
        figures.legible.cache_clear()
        monkeypatch.setattr(figures, "typefaces", lambda has=has: (family, has))
        assert figures.legible("金x") == shown
    figures.legible.cache_clear()


@pytest.mark.parametrize("name", ["W" * 60, LONG, "i" * 500])
@pytest.mark.parametrize("points, size", [(80, 8), (200, 12)])
def test_a_long_name_loses_no_more_than_it_must(name, points, size):
    figure, _ = figures.canvas(1, 1)
    shown = figures.legible(name, points, size)
    kept = shown.removesuffix("…")
    assert shown.endswith("…") and name.startswith(kept)
    room = points / 10                                                 # drawn in whole pixels
    assert width(figure, shown, size) < points + room
    assert width(figure, name[:len(kept) + 1] + "…", size) > points - room
    assert figures.legible(name[:8], points, size) == name[:8]


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_epochs_have_whole_ticks_and_one_epoch_has_one(epochs):
    figure, ((axis,),) = figures.canvas(1, 1)
    axis.plot(range(1, epochs + 1), range(epochs), ".-")
    figures.whole_epochs(axis)
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert all(tick == round(tick) for tick in ticks) and 1 <= len(ticks) <= 12
    assert epochs > 3 or ticks == list(range(1, epochs + 1))
