"""Figures: the picture of a run says what happened; names in any script are drawn and cut."""
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lab import figures

LONG = "a name of sixty characters that goes on and on until it ends"
NAMES = ["金鱼", "سمكة ذهبية", "🐟 fish", LONG, r"$\frac$ cost", "_under", "tab\tline\n",
         "not \udcff decoded"]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are saved, but not painted."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **options: kept.append(self))
    return kept


def history(*entries):
    names = ("epoch", "loss", "feedback", "train_error", "test_error")
    return [dict(zip(names, entry, strict=True)) for entry in entries]


def colours(axis):
    """{label: its line's colour and what the legend shows beside it}"""
    handles = axis.get_legend().legend_handles
    shown = {text.get_text(): to_rgb(handle.get_color()) for text, handle in zip(
        axis.get_legend().get_texts(), handles, strict=True)}
    return {line.get_label(): (to_rgb(line.get_color()), shown[line.get_label()])
            for line in axis.lines}


def test_curves_are_the_history_s_by_name_colour_and_epoch(drawn, tmp_path):
    figures.draw_run("net on data", 75.0, history((3, 0.9, 0.5, 60, 70), (4, 0.3, 0.2, 20, 40)),
                     (), (), (), ["a"], tmp_path / "run.png")
    figure, = drawn
    left, right = figure.axes[:2]
    found = {line.get_label(): [*zip(*line.get_data(), strict=True)]
             for axis in (left, right) for line in axis.lines}
    assert found == {"loss": [(3, 0.9), (4, 0.3)], "feedback": [(3, 0.5), (4, 0.2)],
                     "train error": [(3, 60), (4, 20)], "test error": [(3, 70), (4, 40)],
                     "chance": [(0, 75), (1, 75)]}                     # from edge to edge
    assert [line.get_label() for line in left.lines] == ["loss", "feedback"]
    assert [axis.get_ylabel() for axis in (left, right)] == ["loss", "error (%)"]
    for axis in (left, right):
        pairs = colours(axis)
        assert all(line == legend for line, legend in pairs.values())
        assert len(set(pairs.values())) == len(axis.lines)
        assert axis.get_xlabel() == "epoch"
    assert figure.get_suptitle() == "net on data"
    assert not any(axis.axison for axis in figure.axes[2:])            # no image, no frame


def test_an_answer_is_the_image_what_the_network_said_and_what_it_is(drawn, tmp_path):
    """Pixels channel by channel; predicted first; red where they differ."""
    images = torch.rand(3, 3, 2, 4)
    images[2] = images[2, :1]
    figures.draw_run("", 75.0, [], images, [0, 1, 0], [0, 2, 1], ["cat", "dog", "cow"],
                     tmp_path / "x.png")
    cells = drawn[0].axes[2:]
    captions = [axis.get_title() for axis in cells[:3]]
    assert captions == ["cat", "dog / cow", "cat / dog"]
    looks = [to_rgb(axis.title.get_color()) for axis in cells[:3]]
    assert looks[0] == to_rgb("black") != looks[1] == looks[2]
    for axis, image in zip(cells, images, strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), image.permute(1, 2, 0))
    assert len(cells) == 24 and not any(axis.axison or axis.images for axis in cells[3:])
    one = history((1, 0.9, 0.0, 60, 70))                               # of a net without feedback
    figures.draw_run("", 75.0, one, images[2:, :1], [0], [0], ["cat"], tmp_path / "x.png")
    assert [line.get_label() for line in drawn[1].axes[0].lines] == ["loss"]
    np.testing.assert_array_equal(drawn[1].axes[2].images[0].get_array(),      # grey is three times
                                  images[2].permute(1, 2, 0))


def test_names_of_any_script_and_length_stand_apart_above_their_images(drawn, tmp_path,
                                                                       monkeypatch):
    """Laid out, which looks up every glyph.  Warnings are errors here; one is missing: no error."""
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **options: drawn.append(self) or
                        self.draw_without_rendering())
    n = len(NAMES)
    answers, labels = [k % n for k in range(24)], [(k + k // n) % n for k in range(24)]
    figures.draw_run("$x$ " + NAMES[0], 90.0, history((1, 0.5, 0.1, 50, 60)),
                     torch.rand(24, 1, 8, 8), answers, labels, NAMES, tmp_path / "run.png")
    axes = drawn[0].axes[2:]
    boxes = [artist.get_window_extent() for axis in axes for artist in (axis, axis.title)]
    assert len(boxes) == 48
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    for image, text in zip(boxes[::2], boxes[1::2], strict=True):
        assert image.y1 <= text.y0 < image.y1 + 12
        assert abs(text.x0 + text.x1 - image.x0 - image.x1) < 2        # centred


@pytest.mark.parametrize("name, shown", [
    ("naïve café_1", "naïve café_1"), ("$5", r"\$5"), ("twelve chars", "twelve chars"),
    ("thirteen char", "thirteen ch…"), ("$" * 13, r"\$" * 11 + "…"), ("\udcff", "?")])
def test_words_are_the_user_s_but_cut_and_no_formula(name, shown):
    assert figures.shortened(name, 12) == shown


def picture(text, path):
    figure, ((axis,),) = figures.canvas(1, 1, width=2, height=1)
    axis.set_axis_off()
    axis.text(0, 0, text, fontsize=20)
    figures.save_figure(figure, path)
    return np.asarray(Image.open(path).convert("L"))


def test_a_character_is_drawn_by_the_first_typeface_that_has_it(tmp_path, monkeypatch):
    """cmr10 has no Cyrillic; a typeface that is not installed is passed over."""
    def ink(text, *typefaces):
        monkeypatch.setattr(figures, "TYPEFACES", typefaces)
        return (255 - picture(text, tmp_path / "x.png").astype(float)).sum()
    both = "No Such Typeface", "cmr10", "DejaVu Sans"
    for text, typeface, other in (("Ж", "DejaVu Sans", "cmr10"), ("ww", "cmr10", "DejaVu Sans")):
        assert ink(text, *both) == pytest.approx(ink(text, typeface), rel=0.01)
        assert ink(text, *both) != pytest.approx(ink(text, other), rel=0.05)


def test_a_missing_glyph_is_no_error_and_other_warnings_are_not_swallowed(tmp_path, monkeypatch,
                                                                         capsys):
    assert (picture("金", tmp_path / "x.png") < 128).any()
    assert not capsys.readouterr().err
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: warnings.warn(
        "odd", stacklevel=1))
    with pytest.raises(UserWarning, match="odd"):
        picture("a", tmp_path / "x.png")


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_epochs_have_whole_ticks_and_one_epoch_has_one(epochs):
    figure, ((axis,),) = figures.canvas(1, 1)
    axis.plot(range(1, epochs + 1), range(epochs), ".-")
    figures.whole_epochs(axis)
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert all(tick == round(tick) for tick in ticks) and 1 <= len(ticks) <= 12
    assert epochs > 3 or ticks == list(range(1, epochs + 1))


# ---- Figures of the paper ------------------------------------------------------------------------

def moment(epoch, percent, length):
    return {"epoch": epoch, "percent": percent, "length": length}


def test_figure_2_draws_each_moment_s_shares_and_lengths(drawn, tmp_path):
    """Bins of a half; a bin without votes has no length; one scale of shares."""
    lines = {"Dynamic": [{"moments": [moment(0, [10, 20, 0, 70], [1, 2, 3, 4]),
                                      moment(6, [5, 5, 60, 30], [4, 3, 2, 1])]}],
             "EM": [{"moments": [moment(1, [0, 0, 0, 100], [0, 0, 0, 9])]}]}
    figures.draw_figure2(lines, "of votes", tmp_path / "x.png")
    panels = {axis.get_title(): axis for axis in drawn[0].axes if axis.get_title()}
    assert set(panels) == {"Dynamic, epoch 0", "Dynamic, epoch 6", "EM, epoch 1"}
    twins = [axis for axis in drawn[0].axes if axis.lines]
    for (title, axis), twin, moments in zip(panels.items(), twins, [
            *lines["Dynamic"][0]["moments"], *lines["EM"][0]["moments"]], strict=True):
        bars = [(bar.get_x(), bar.get_height()) for bar in axis.patches]
        assert bars == [(-1 + k / 2, share) for k, share in enumerate(moments["percent"])], title
        x, y = twin.lines[0].get_data()
        assert x.tolist() == [-0.75, -0.25, 0.25, 0.75]
        np.testing.assert_array_equal(y, [length if share else np.nan for share, length in zip(
            moments["percent"], moments["length"], strict=True)])
        assert axis.get_ylim() == (0, 105) and twin.get_ylim()[0] == 0


def test_figure_4_is_the_mean_over_seeds(drawn, tmp_path):
    """Of an uneven number, so that a median or a sum is another; dashed without the divergence."""
    runs = {"EncapNet": [[1.0, 0.5], [2.0, 0.5], [6.0, 0.2]], "EncapNet * OT": [[4.0, 3.0]],
            "ResNet": [[8.0, 7.0]]}
    figures.draw_figure4({name: [{"curves": {"loss": loss}} for loss in seeds]
                          for name, seeds in runs.items()}, "loss", tmp_path / "x.png")
    left, right = drawn[0].axes
    found = {line.get_label(): (line.get_xdata().tolist(), pytest.approx(line.get_ydata().tolist()))
             for axis in (left, right) for line in axis.lines}
    assert found == {"EncapNet": ([1, 2], [3.0, 0.4]), "EncapNet * OT": ([1, 2], [4.0, 3.0]),
                     "ResNet": ([1, 2], [8.0, 7.0])}
    assert [line.get_label() for line in right.lines] == ["ResNet"]
    assert [line.get_linestyle() for line in left.lines] == ["--", "-"]
    assert all(line == legend for line, legend in colours(left).values())
    assert len({colour for colour, _ in colours(left).values()}) == 2


def test_a_file_is_a_picture(tmp_path, capsys):
    figure, _ = figures.canvas(1, 1)
    figures.save_figure(figure, tmp_path / "new" / "x.png")
    with Image.open(tmp_path / "new" / "x.png") as image:
        assert image.format == "PNG" and image.width == 1100
    assert str(tmp_path / "new" / "x.png") in capsys.readouterr().out
