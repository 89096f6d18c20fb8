"""The embedded data set: printed digits in random poses, colours and noise, drawn on the fly."""
import random
from pathlib import Path

import torch
import torch.nn.functional as F

# The 22 of matplotlib's typefaces that draw digits. Whole designs are held out, since a bold or an
# oblique is no new typeface: STIX, a serif; cmss, a sans; cmtt, a typewriter.
TYPEFACES = {
    "train": [f"DejaVu{v}" for v in (
        "Sans Sans-Bold Sans-Oblique Sans-BoldOblique SansMono SansMono-Bold SansMono-Oblique "
        "SansMono-BoldOblique Serif Serif-Bold Serif-Italic Serif-BoldItalic").split()]
    + ["cmr10", "cmb10", "cmti10", "cmmi10"],
    "test": "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmss10 cmtt10".split(),
}
POSE = {  # the columns of poses, with their lowest and highest value
    "x": (-3, 3),           # the middle of the digit's box, in pixels right of the image's centre
    "y": (-3, 3),           # and below it
    "rotation": (-25, 25),  # degrees, counter-clockwise; small, for 6 and 9 must stay apart
    "scale": (-.4, .3),     # log2 of height / 20 pixels: 15 to 25 pixels
    "shear": (-.3, .3),     # lean to the right per unit of height, beyond the typeface's own
}
CELL, GLYPH = 64, 40  # pixels of a glyph's cell and of its height in it, before it is posed
CHUNK = 100           # images drawn at once, from one seed: image k does not depend on n


def rasterise(names):
    """Every digit of every typeface, all of one height, each in the middle of its cell.

    -> glyphs (f, 10, CELL, CELL), ink in [0, 1];  widths (f, 10), in heights
    """
    from matplotlib import get_data_path
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D
    page, widths = RendererAgg(10 * CELL, len(names) * CELL, dpi=72), torch.empty(len(names), 10)
    pen = page.new_gc()
    pen.set_linewidth(0)
    for f, name in enumerate(names):
        font = FontProperties(fname=str(Path(get_data_path(), "fonts/ttf", f"{name}.ttf")))
        for d in range(10):
            path = TextPath((0, 0), str(d), size=100, prop=font)
            box = path.get_extents()
            place = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            place.scale(GLYPH / box.height).translate((d + .5) * CELL, (len(names) - f - .5) * CELL)
            page.draw_path(pen, path, place, rgbFace=(0, 0, 0))
            widths[f, d] = box.width / box.height
    ink = torch.frombuffer(page.buffer_rgba(), dtype=torch.uint8)[3::4] / 255  # the alpha channel
    return ink.view(len(names), CELL, 10, CELL).transpose(1, 2).contiguous(), widths


def pose_glyphs(glyphs, poses, size=32):
    """Draw each glyph in its pose.   (b, CELL, CELL), (b, 5) -> ink (b, size, size)"""
    x, y, rotation, scale, shear = poses.unbind(1)                           # each (b,)
    cos, sin = rotation.deg2rad().cos(), rotation.deg2rad().sin()
    # From image to glyph, so backwards: shift, then turn and shear, then divide by the height.
    turn = torch.stack([cos + shear * sin, shear * cos - sin, sin, cos], 1).view(-1, 2, 2)
    shift = turn @ torch.stack([x, y], 1).unsqueeze(2) * (2 / size)          # (b, 2, 1)
    ratio = size / CELL * GLYPH / (20 * 2**scale)
    theta = torch.cat([turn, -shift], 2) * ratio.view(-1, 1, 1)              # (b, 2, 3)
    grid = F.affine_grid(theta, (len(poses), 1, size, size), align_corners=False)
    return F.grid_sample(glyphs.unsqueeze(1), grid, align_corners=False).squeeze(1)


def draw_chunk(glyphs, widths, generator):
    """CHUNK digits, each with at most two neighbours: other digits, in its pose and ink.

    -> images (b, 3, 32, 32) uint8, labels (b,), poses (b, 5)
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(CHUNK, *shape, generator=generator)

    def choose(low, high, *shape):
        return torch.randint(low, high, (CHUNK, *shape), generator=generator)

    label = torch.randperm(CHUNK, generator=generator).unsqueeze(1) % 10      # (b, 1), balanced
    digits = torch.cat([(label + choose(1, 10, 2)) % 10, label], 1)           # (b, 3), last it
    font = choose(0, len(glyphs), 1)
    pose = torch.stack([uniform(*limits) for limits in POSE.values()], 1)     # (b, 5)
    tint = uniform(-.15, .15, 2, 3)                                           # of ground and ink
    # Neighbours stand along the digit's line, and each is missing one time in three.
    width, height = widths[font, digits], 20 * 2 ** pose[:, 3:4]              # (b, 3), (b, 1)
    step = height * ((width[:, :2] + width[:, 2:]) / 2 + uniform(.08, .3, 2))
    step = torch.where(uniform(0, 1, 2) < 2 / 3, step.clamp(min=10), 99) * torch.tensor([-1, 1])
    poses, turn = pose.unsqueeze(1).repeat(1, 3, 1), pose[:, 2:3].deg2rad()   # (b, 3, 5), (b, 1)
    poses[:, :2, 0] += step * turn.cos()
    poses[:, :2, 1] -= step * turn.sin()
    masks = pose_glyphs(glyphs[font, digits].flatten(0, 1), poses.flatten(0, 1))
    # Two grey levels at least .3 apart, either of them the ink, both tinted.
    contrast = uniform(.3, .7, 1)
    middle = contrast / 2 + uniform(0, 1, 1) * (1 - contrast)
    side = (2 * choose(0, 2, 1) - 1) * torch.tensor([-.5, .5])                # (b, 2)
    colour = (middle + contrast * side).unsqueeze(2) + tint - tint.mean(2, keepdim=True)
    ground, ink = colour[..., None, None].unbind(1)                           # (b, 3, 1, 1)
    # Ground with a gradient and blotches, ink over it, then a camera's blur and noise.
    ramp = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 32)]).T           # (2, 32 * 32)
    image = (uniform(-.1, .1, 1, 2) @ ramp).view(CHUNK, 1, 32, 32) + ground
    image = image + F.interpolate(uniform(-.08, .08, 3, 5, 5), size=(32, 32), mode="bilinear")
    for mask in masks.view(CHUNK, 3, 1, 32, 32).unbind(1):
        image = image.lerp(ink, mask)
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = image.lerp(blurred, uniform(0, 1, 1, 1, 1))
    image += uniform(.01, .06, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().byte(), label.squeeze(1), pose


def draw_digits(n, train=True, seed=0):
    """n images of printed digits; the test split is in typefaces that training never shows.

    -> images (n, 3, 32, 32) uint8, labels (n,), poses (n, 5) with the columns of POSE
    """
    split, chunks = "train" if train else "test", []
    glyphs, widths = rasterise(TYPEFACES[split])
    for c in range(0, max(n, 1), CHUNK):
        mixed = random.Random(f"{split} {seed} {c}").getrandbits(32)
        chunks.append(draw_chunk(glyphs, widths, torch.Generator().manual_seed(mixed)))
    return tuple(torch.cat(part)[:n] for part in zip(*chunks, strict=True))
