"""The vision half of an ONNX Runtime engine: writing its graph, and running it.

Legend: N tiles, C colour channels, Y X pixels of a tile, M = N * Q + 1 feature rows (Q patches a tile and the newline), D hidden size,
n tokens of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.config import EngineConfig, VisionHalf
from engines.errors import ENVIRONMENT, EngineError
from engines.onnxruntime.devices import check_started, providers
from engines.vision.pixels import PreparedImage

GRAPH, WEIGHTS, DATA = "vision.onnx", "vision.weights.json", "vision.weights.bin"
PIXELS, FEATURES = "pixels", "features"
# Of one run of the graph: bounds the memory for activations (published sizes: 21 MiB of scores a tile and layer).
TILES_AT_A_TIME = 4
Steps = Generator[None, None, NDArray[np.float32]]
"""Work in steps: `next` does one, and the last one raises StopIteration with the result."""


class OrtTower:
    """An open vision graph of the engine in `folder`; uses `weights` where they lie. `width`: D."""

    def __init__(
        self, folder: Path, vision: VisionHalf, weights: dict[str, np.ndarray], width: int, *, threads: int, device: str
    ) -> None:
        self._vision, self._width = vision, width
        self._weights = [(array, ort.OrtValue.ortvalue_from_numpy(array)) for array in weights.values()]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # failures arrive as exceptions
        for name, (_, value) in zip(weights, self._weights, strict=True):
            options.add_initializer(name, value)
        graph = folder / vision.graph
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=providers(device))
        except Exception as error:
            text = str(error).splitlines()[0]
            raise EngineError(f"{graph}: ONNX Runtime cannot load it: {text}", exit_code=ENVIRONMENT) from error
        check_started(self._session, device)

    def rows(self, tiles_NCYX: NDArray[np.float32]) -> Steps:
        """In steps, the features of all patches, tile by tile, and the newline behind them, [M, D]."""
        side = self._vision.tile
        if tiles_NCYX.ndim != 4 or not len(tiles_NCYX) or tiles_NCYX.shape[1:] != (3, side, side):
            raise EngineError(f"tiles must be [tiles, 3, {side}, {side}], not {list(tiles_NCYX.shape)}")
        patches = self._vision.patches_per_side**2
        rows_MD = np.empty((len(tiles_NCYX) * patches + 1, self._width), np.float32)
        for start in range(0, len(tiles_NCYX), TILES_AT_A_TIME):
            if start:
                yield
            piece = np.ascontiguousarray(tiles_NCYX[start : start + TILES_AT_A_TIME], np.float32)
            try:
                (found,) = self._session.run([FEATURES], {PIXELS: piece})
                # The next piece overwrites the newline.
                rows_MD[start * patches : (start + len(piece)) * patches + 1] = found
            except Exception as error:
                text = str(error).splitlines()[0]
                raise EngineError(f"ONNX Runtime failed on an image: {text}", exit_code=ENVIRONMENT) from error
        return rows_MD

    def steps(self, image: PreparedImage) -> Steps:
        """In steps of one run each, what the image puts into a prompt, [n, D]."""
        rows_MD = yield from self.rows(image.tiles_NCYX)
        return rows_MD[image.rows_n]

    def features(self, images: Sequence[PreparedImage]) -> NDArray[np.float32]:
        """What the images put into a prompt, one after the other, [n, D]."""
        out_nD = np.empty((sum(image.tokens for image in images), self._width), np.float32)
        end = 0
        for image in images:
            start, end = end, end + image.tokens
            out_nD[start:end] = result(self.steps(image))
        return out_nD


def result(steps: Steps) -> NDArray[np.float32]:
    """What comes of them, after taking all."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: NDArray[np.float32] = end.value
            return found


def image_width(config: EngineConfig) -> int | None:
    """Hidden size of the text model, if its graph takes image features."""
    found = [port.dims[1] for port in config.inputs if port.name == "image_features"]
    return found[0] if found and isinstance(found[0], int) else None


def build_vision(
    model: Any, writer: Any, checkpoint: Any, progress: Callable[[str, int, int], None]
) -> tuple[str, str]:
    """Write the canonical vision graph and its weights with `writer` (`engines.directory.EngineFiles`), as
    `engines.onnxruntime.build.build` does with a rank's; the names of the graph and of the list of weights.

    `checkpoint`: the reference that the engine's configuration will hold. Raises EngineError when the graph cannot be lowered.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    from engines.onnxruntime.build import weight_dtype, write_graph
    from engines.onnxruntime.lowering import LowerLinear, LowerOpset
    from engines.placing import place_weights

    passes = [
        LowerLinear(),
        LowerOpset(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    ]
    try:
        ir.passes.Sequential(*passes)(model)
    except (ValueError, ir.passes.PassError) as error:
        raise EngineError(f"the vision graph cannot be lowered to ONNX Runtime: {error.__cause__ or error}") from error
    manifest = place_weights(model, writer, DATA, checkpoint, progress, dtype_of=weight_dtype, own_copy=_is_looked_at)
    write_graph(writer, GRAPH, model)
    writer.write(WEIGHTS, manifest.to_json())
    return GRAPH, WEIGHTS


def _is_looked_at(value: Any) -> bool:
    """Whether ONNX Runtime may read the weight while it loads the graph, to fuse or rearrange nodes: it would look for the bytes where
    the graph file says, and for a weight in the checkpoint that is a placeholder. Matrices of linear layers it only packs.
    """
    return any(usage.node.op_type != "FusedMatMul" for usage in value.uses())
