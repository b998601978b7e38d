"""Which feature row each token of an image takes: whole-number arithmetic, no features touched.

A vision graph gives, for the N tiles of an image, Q rows a tile and a newline row behind them all. The first tile is the image's
thumbnail; the others lie on a grid, row by row. Sizes are (height, width).

Legend: Y X rows and columns of the map of all tiles but the thumbnail, n tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionHalf
from engines.errors import EngineError

MOST_PIXELS, MOST_RESOLUTIONS, MOST_TILES = 4096, 1024, 64
Size = tuple[int, int]


def check_half(vision: VisionHalf, vocab_size: int) -> None:
    """Raises EngineError unless the numbers of an engine's configuration, an untrusted file, are ones that images can be cut by."""
    tile, side = vision.tile, vision.patches_per_side
    sound = (
        0 < tile <= MOST_PIXELS
        and 0 < side <= tile
        and 0 <= vision.image_token_id < vocab_size
        and 0 < len(vision.pinpoints) <= MOST_RESOLUTIONS
        and all(
            len(pair) == 2 and min(pair) > 0 and not (pair[0] % tile or pair[1] % tile) for pair in vision.pinpoints
        )
        and all(pair[0] * pair[1] <= MOST_TILES * tile * tile for pair in vision.pinpoints)
        and len(vision.mean) == len(vision.std) == 3
        and all(0 < std < 1e3 for std in vision.std)
        and all(abs(mean) < 1e3 for mean in vision.mean)
    )
    if not sound:
        raise EngineError("the engine's description of its vision half makes no sense; rebuild the engine")


def best_resolution(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The resolution at which most of the image's own pixels survive; of equal ones that with the least empty area, the first."""
    sides = np.asarray(pinpoints, np.int64)
    scale = np.minimum(sides[:, 1] / size[1], sides[:, 0] / size[0])
    inside = (size[0] * scale).astype(np.int64) * (size[1] * scale).astype(np.int64)
    kept = np.minimum(inside, size[0] * size[1])
    chosen = np.lexsort((sides.prod(1) - kept, -kept))[0]  # stable: the first of equal ones
    return int(sides[chosen, 0]), int(sides[chosen, 1])


def token_rows(size: Size, vision: VisionHalf) -> NDArray[np.int64]:
    """The row of every token of an image of `size` pixels, [n]."""
    side = vision.patches_per_side
    height, width = best_resolution(size, vision.pinpoints)
    grid = height // vision.tile, width // vision.tile
    tiles = 1 + grid[0] * grid[1]
    newline = tiles * side * side
    # [grid rows, grid columns, side, side] as they lie -> the map [Y, X] as one sees it
    rows_YX = np.arange(side * side, newline).reshape(*grid, side, side).swapaxes(1, 2).reshape(grid[0] * side, -1)
    top, left = _padding(size, rows_YX.shape)
    rows_YX = rows_YX[top : len(rows_YX) - top, left : rows_YX.shape[1] - left]
    rows_YX = np.pad(rows_YX, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate([np.arange(side * side), rows_YX.reshape(-1)])


def _padding(size: Size, current: tuple[int, ...]) -> Size:
    """Rows of the map above (and below), and columns left (and right) of the image: padding that made it fit."""
    if size[1] / size[0] > current[1] / current[0]:
        return (current[0] - size[0] * current[1] // size[1]) // 2, 0
    return 0, (current[1] - size[1] * current[0] // size[0]) // 2
