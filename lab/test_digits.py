"""Printed digits: what is drawn is what labels and poses say."""
import pytest
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from lab import digits
from lab.digits import CELL, GLYPH, POSE, TYPEFACES, draw_digits, pose_glyphs, rasterise

# ---- Printed digits ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sheet():
    return draw_digits(200, True, 0)


def moments(ink):
    """ink (b, h, w) -> mass (b,), x and y of the centroid in pixels from the image's centre"""
    h, w = ink.shape[-2:]
    mass = ink.sum((1, 2))
    x = (ink.sum(1) * (torch.arange(w) - (w - 1) / 2)).sum(1) / mass
    y = (ink.sum(2) * (torch.arange(h) - (h - 1) / 2)).sum(1) / mass
    return mass, x, y


def posed(glyphs, x=0., y=0., rotation=0., scale=0., shear=0.):
    pose = torch.tensor([[x, y, rotation, scale, shear]])
    return pose_glyphs(glyphs, pose.repeat(len(glyphs), 1))


def blob(u, v):
    """A dot u heights right of the middle and v below it."""
    at = (torch.arange(CELL) - (CELL - 1) / 2) / GLYPH
    return torch.exp(-((at - u)**2 + (at[:, None] - v)**2) / .003).unsqueeze(0)


RANGES = {"x": (-3, 3), "y": (-3, 3), "rotation": (-25, 25), "height": (15.157, 24.623),
          "shear": (-.3, .3)}             # pixels from the middle, degrees, pixels, lean


@pytest.mark.parametrize("split", [True, False])
def test_digits_shapes_ranges_balance(split):
    images, labels, poses = draw_digits(600, split, 3)
    assert images.shape == (600, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == 10 * [60]
    assert poses.shape == (600, len(POSE)) and poses.dtype == torch.float32
    poses[:, 3] = 20 * 2 ** poses[:, 3]                           # a height of 15 to 25 pixels
    for column, (low, high) in zip(poses.T, RANGES.values(), strict=True):
        assert low - 1e-3 <= column.min() < low + .1 * (high - low)
        assert high + 1e-3 >= column.max() > high - .1 * (high - low)
    assert images.float().std((1, 2, 3)).min() > 5                # no image is blank
    assert [len(part) for part in draw_digits(0, split)] == [0, 0, 0]


@pytest.mark.parametrize("split, twelve, pose, colour, mean, sd", [
    (True, [7, 9, 0, 1, 6, 2, 3, 4, 9, 9, 2, 8],
     [1.9381, -0.8675, -16.812, -0.2099, 0.1326], [118.25, 85.6, 82.85], 130.012, 71.983),
    (False, [7, 9, 9, 2, 2, 1, 8, 8, 1, 9, 5, 8],
     [-2.8781, 0.0479, -0.268, -0.255, -0.0586], [15.99, 19.97, 32.74], 122.933, 73.244)])
def test_digits_are_those_that_results_are_of(split, twelve, pose, colour, mean, sd):
    """Where this fails, every result on digits is of other images and must be run anew.

    No hash of the pixels: another processor or matplotlib may round a few the other way.
    """
    images, labels, poses = draw_digits(200, split)
    assert labels[:12].tolist() == twelve and poses[7].tolist() == pytest.approx(pose, abs=1e-3)
    assert images[7].float().mean((1, 2)).tolist() == pytest.approx(colour, abs=0.2)
    assert images.float().mean().item() == pytest.approx(mean, abs=0.02)
    assert images.float().std().item() == pytest.approx(sd, abs=0.02)


def test_digits_depend_on_seed_split_and_index_alone(sheet):
    for a, b in zip(sheet, draw_digits(130, True, 0), strict=True):
        assert torch.equal(a[:130], b)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    others = [draw_digits(200, *other) for other in ((True, 1), (False, 0), (True, 2**32))]
    assert torch.equal(torch.get_rng_state(), before)             # the global one is left alone
    for other in others:
        assert (other[0] != sheet[0]).flatten(1).any(1).all()
        assert .05 < (other[1] == sheet[1]).float().mean() < .15  # labels are drawn anew as well
    chunks = torch.stack(sheet[2].split(100))
    assert len(chunks.unique(dim=0)) == len(chunks)               # no chunk repeats another


def test_typefaces_are_disjoint_designs_and_true_ones():
    train, test = TYPEFACES["train"], TYPEFACES["test"]
    assert len(set(train)) == 16 and len(set(test)) == 6 and not set(train) & set(test)

    def families(names):
        fonts = [FT2Font(f"{get_data_path()}/fonts/ttf/{name}.ttf") for name in names]
        return {font.family_name.split()[0] for font in fonts}
    assert not families(train) & families(test)


def test_every_typeface_draws_ten_distinct_digits_of_one_height():
    glyphs, widths = rasterise(TYPEFACES["train"] + TYPEFACES["test"])
    assert glyphs.shape == (22, 10, CELL, CELL) and 0 <= glyphs.min() and glyphs.max() == 1
    rows, columns = glyphs.amax(3), glyphs.amax(2)
    assert ((rows.sum(2) - GLYPH).abs() < 1.5).all()
    assert ((columns.sum(2) - GLYPH * widths).abs() < 2.5).all()
    middle = torch.arange(CELL) - (CELL - 1) / 2
    for profile in (rows, columns):                               # the box sits in the middle
        assert ((profile > 0) * middle).sum(2).abs().max() / GLYPH < 1
    flat = F.normalize(glyphs.flatten(2) - glyphs.flatten(2).mean(2, keepdim=True), dim=2)
    alike = flat @ flat.transpose(1, 2) - 2 * torch.eye(10)       # (f, 10, 10), own digit left out
    assert alike.max() < .9
    # The nine other digits of a typeface are less like a digit than the same digit elsewhere.
    flat = F.normalize(F.avg_pool2d(glyphs, 4).flatten(2) - glyphs.mean((2, 3))[..., None], dim=2)
    alike = torch.einsum("fdp,gep->fdge", flat, flat)
    for f in range(22):
        alike[f, :, f] = -1
    nearest = alike.amax(2).argmax(2)                             # (f, 10) digit of the best match
    assert (nearest == torch.arange(10)).float().mean() > .97


@pytest.mark.parametrize("pose, u, v, x, y", [
    (dict(x=2., y=-1.), 0, 0, 2, -1),
    (dict(rotation=90.), .2, 0, 0, -4),          # counter-clockwise: from the right to the top
    (dict(rotation=30.), .3, 0, 5.196, -3),
    (dict(scale=-1.), .4, -.4, 4, -4),           # 10 pixels high instead of 20
    (dict(shear=.25), 0, -.4, 2, -8),            # the top leans to the right
    (dict(shear=.25), 0, .4, -2, 8),
    (dict(shear=.25), .3, 0, 6, 0),
    (dict(rotation=90., shear=.5), 0, -.4, -8, -4),  # sheared first, then turned, then moved
    (dict(rotation=90., x=3., y=1.), .2, 0, 3, -3),
])
def test_a_pose_moves_a_dot_as_stated(pose, u, v, x, y):
    _, cx, cy = moments(posed(blob(u, v), **pose))
    assert cx.item() == pytest.approx(x, abs=.1) and cy.item() == pytest.approx(y, abs=.1)


def test_glyphs_posed_keep_their_moments():
    glyphs = rasterise(["DejaVuSans"])[0][0]                      # (10, CELL, CELL)
    mass, x, y = moments(posed(glyphs))
    for rotation, sign in ((0., 1), (180., -1)):
        same, mx, my = moments(posed(glyphs, x=2.5, y=-3., rotation=rotation))
        assert torch.allclose(mx, sign * x + 2.5, atol=.05)
        assert torch.allclose(my, sign * y - 3, atol=.05)
        assert torch.allclose(same, mass, rtol=.02)
    assert torch.allclose(moments(posed(glyphs, scale=-.5))[0], mass / 2, rtol=.03)
    assert torch.allclose(moments(posed(glyphs, shear=.3))[0], mass, rtol=.02)


def test_two_neighbours_in_three_stand_on_the_line_beyond_the_digit_as_high_as_it(monkeypatch):
    """Ink left and right of the digit's box, in its own frame; a gap next to it, none above."""
    monkeypatch.setitem(TYPEFACES, "train", ["DejaVuSans-Bold"])
    images, labels, poses = draw_digits(600, True, 1)
    widths = rasterise(TYPEFACES["train"])[1][0][labels]          # in heights
    x, y, rotation, scale, shear = poses.T[:, :, None, None]
    at = torch.arange(32.) - 15.5
    dx, dy = at - x, at[:, None] - y                              # (b, 32, 32) from the middle
    cos, sin = rotation.deg2rad().cos(), rotation.deg2rad().sin()
    height = 20 * 2**scale
    v = (sin * dx + cos * dy) / height                            # heights down, and right
    u = (cos * dx - sin * dy) / height + shear * v
    beyond = u.abs() - widths[:, None, None] / 2
    ground = images.float().flatten(2).median(2).values[..., None, None]
    ink = (images - ground).abs().sum(1) > 90
    line = v.abs() < .4
    sides = []
    for side in (u < 0, u > 0):
        there = side & line & (beyond > .35) & (beyond < .5)
        enough = there.flatten(1).sum(1) > 12                     # not cut off by the border
        sides.append(((ink & there).flatten(1).sum(1) > 0)[enough].float().mean())
    assert all(.55 < share < .8 for share in sides), sides
    turned = ink & (rotation.abs() > 10) & (beyond > .1) & (beyond < .5) & (v.abs() < .8)
    off = (v * u.sign() * rotation.sign())[turned].mean()         # 0: on the line, turned or not
    assert off.abs() < .07, off
    gap = (line & (beyond > .02) & (beyond < .06)).flatten(1)
    inside = (line & (beyond < 0)).flatten(1)
    above = (u.abs() < .3) & (v.abs() > .57) & (v.abs() < .8)
    shares = [(ink.flatten(1) & where.flatten(1)).sum() / where.sum()
              for where in (inside, gap, above)]
    assert shares[0] > .4 and max(shares[1:]) < .5 * shares[0], shares


@pytest.mark.parametrize("width", [0, 2])
def test_the_middles_of_neighbours_are_ten_pixels_apart_or_more(width, monkeypatch):
    """By their widths and a gap of .08 to .3 heights; 99 pixels, out of the image, if missing."""
    seen = []
    monkeypatch.setattr(digits, "pose_glyphs", lambda glyphs, poses: seen.append(poses) or
                        torch.zeros(len(poses), 32, 32))
    digits.draw_chunk(torch.zeros(1, 10, CELL, CELL), torch.full((1, 10), float(width)),
                      torch.Generator().manual_seed(0))
    poses = seen[0].view(-1, 3, 5)
    apart = (poses[:, :2, :2] - poses[:, 2:, :2]).norm(dim=2)
    there = apart < 98
    assert 0.55 < there.float().mean() < 0.8
    gap = (apart / (20 * 2 ** poses[:, 2:, 3]) - width)[there]
    if width:
        assert 0.08 <= gap.min() < 0.1 and 0.28 < gap.max() <= 0.3
    else:
        assert apart[there].tolist() == pytest.approx([10] * int(there.sum()))


@pytest.mark.parametrize("split", [True, False])
def test_poses_and_labels_describe_the_images(split):
    """A template of the label in its pose explains the image; in any other pose it does not."""
    images, labels, poses = draw_digits(200, split, 4)
    glyphs, _ = rasterise(TYPEFACES["train" if split else "test"])
    ground = images.float().flatten(2).median(2).values[..., None, None]
    ink = (images - ground).abs().sum(1).flatten(1)

    def standard(pixels):
        return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)

    def likeness(labels, poses):                                  # correlation, (b,)
        template = pose_glyphs(glyphs.mean(0)[labels], poses).flatten(1)
        return (standard(ink) * standard(template)).sum(1)

    true = likeness(labels, poses)
    for column, (low, high) in enumerate(POSE.values()):          # each column matters
        wrong = poses.clone()
        wrong[:, column] = low + high - wrong[:, column]          # mirrored about its middle
        far = (wrong - poses)[:, column].abs() > .5 * (high - low)
        assert (true - likeness(labels, wrong))[far].mean() > .02, list(POSE)[column]
    assert true.mean() > likeness((labels + 1) % 10, poses).mean() + .1


def test_each_split_draws_in_its_own_typefaces_alone(monkeypatch):
    train, test = draw_digits(20, True)[0], draw_digits(20, False)[0]
    monkeypatch.setitem(TYPEFACES, "train", ["cmr10"])
    assert torch.equal(draw_digits(20, False)[0], test)
    assert not torch.equal(draw_digits(20, True)[0], train)
