"""The vision half of an engine: traced, bound to the checkpoint and written beside the text model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from engines.config import EngineConfig, VisionHalf
from engines.directory import EngineDirWriter
from engines.errors import DISAGREEMENT, EngineError
from mxcompile.progress import StageClock

if TYPE_CHECKING:
    from engines.interface import Session
    from export.weights import Source
    from model_defs.checkpoint.processor import ImageProcessing
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig
    from model_defs.vision_config import VisionConfig


def add_vision(
    engine: EngineConfig, config: ModelConfig, opened: Checkpoint, writer: EngineDirWriter, clock: StageClock
) -> tuple[EngineConfig, int]:
    """`engine` with a vision half, whose files are written; and the bytes of it that stay in the checkpoint.

    Raises what `build` does.
    """
    from engines.onnxruntime.vision import build_vision
    from export.vision import bind_vision_weights, trace_vision
    from model_defs.checkpoint.processor import read_processing
    from mxcompile.building import referenced_bytes
    from mxcompile.exporting import quiet

    vision = config.vision
    assert vision is not None
    with clock.stage("vision"):
        with quiet():
            model = trace_vision(config, engine.dtype)
        bind_vision_weights(model, config, cast("Source", opened))
        referenced = referenced_bytes(model)
        graph, weights = build_vision(model, writer, engine.checkpoint, lambda stage, done, total: None)
    half = vision_half(vision, read_processing(opened.folder, vision), graph=graph, weights=weights)
    return dataclasses.replace(engine, vision=half), referenced


def vision_half(vision: VisionConfig, processing: ImageProcessing, *, graph: str = "", weights: str = "") -> VisionHalf:
    """What a session needs to know to read images for this vision half."""
    return VisionHalf(
        graph=graph,
        weights=weights,
        image_token_id=vision.image_token_id,
        tile=vision.image_size,
        patches_per_side=vision.patches_per_side,
        pinpoints=[list(pair) for pair in vision.grid_pinpoints],
        mean=list(processing.mean),
        std=list(processing.std),
    )


def run_vision_once(session: Session) -> None:
    """Run the vision graph of a finished engine on an empty picture."""
    import numpy as np

    from engines.vision.layout import best_resolution, token_rows
    from engines.vision.pixels import PreparedImage

    vision = session.config.vision
    assert vision is not None
    size = vision.tile, vision.tile
    height, width = best_resolution(size, vision.pinpoints)
    tiles_NCYX = np.zeros((1 + height * width // vision.tile**2, 3, *size), np.float32)
    rows_n = token_rows(size, vision)
    features_nD = cast(Any, session).image_features([PreparedImage("image", size, tiles_NCYX, rows_n)])
    if not np.isfinite(features_nD).all():
        raise EngineError(
            "the built engine computes image features that are not finite; verify the checkpoint (mxcompile checkpoint verify)",
            exit_code=DISAGREEMENT,
        )
