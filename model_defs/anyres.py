"""How an image of any size becomes tiles, and what of their features is kept: whole-number arithmetic (facts, section 5).

Sizes are (height, width) in pixels unless said.
"""

from __future__ import annotations

from model_defs.vision_config import VisionConfig

Size = tuple[int, int]


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint at which most of the image's own pixels survive; of equal ones that with the least empty area, then the first."""
    height, width = size
    best, best_kept, best_waste = pinpoints[0], -1, 0
    for pinpoint in pinpoints:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        inside = int(width * scale) * int(height * scale)
        kept = min(inside, width * height)
        waste = pinpoint[0] * pinpoint[1] - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = pinpoint, kept, waste
    return best


def tile_grid(size: Size, config: VisionConfig) -> Size:
    """Rows and columns of tiles that an image of `size` is cut into."""
    height, width = best_resolution(size, config.grid_pinpoints)
    return height // config.image_size, width // config.image_size


def padding(size: Size, current: Size) -> Size:
    """Rows to drop at top and bottom each, and columns at left and right each, of a feature map of size `current` that holds an
    image of `size` in its middle. One of the two is 0.
    """
    (height, width), (rows, columns) = size, current
    if width / height > columns / rows:
        return (rows - height * columns // width) // 2, 0
    return 0, (columns - width * rows // height) // 2


def image_tokens(size: Size, config: VisionConfig) -> int:
    """Tokens that an image of `size` takes in a prompt: its thumbnail's, and its rows' with a newline each."""
    grid_rows, grid_columns = tile_grid(size, config)
    side = config.patches_per_side
    rows, columns = grid_rows * side, grid_columns * side
    drop_rows, drop_columns = padding(size, (rows, columns))
    return config.patches + (rows - 2 * drop_rows) * (columns - 2 * drop_columns + 1)
