"""One rank's session: the ONNX Runtime session with its graph in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.config import EngineConfig
from engines.errors import ENVIRONMENT, EngineError
from engines.onnxruntime.session import OrtSession
from engines.parallel import pieces
from engines.parallel.exchange import Exchanger
from engines.parallel.heads import of_rank
from engines.parallel.piecewise import LoadedPiece, PiecewiseSession


def share_threads(threads: int) -> None:
    """One thread pool and one allocator for all pieces of this process. Once per process, before the first session."""
    ort.set_global_thread_pool_sizes(threads, 1)
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


class RankSession(OrtSession):
    """What one rank computes. Every rank must make the same calls in the same order."""

    _tapped_graph: Path  # the one that gives out inner values

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        weights: dict[str, np.ndarray],
        exchanger: Exchanger,
        *,
        threads: int,
        prepack: bool = True,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._exchanger, self._tick = exchanger, tick
        rank = exchanger.rank
        files = next(files for files in config.ranks if files.rank == rank)
        prefill_graph = None if files.prefill_graph is None else folder / files.prefill_graph
        self._tapped_graph = folder / files.graph
        super().__init__(
            of_rank(config, rank), folder / files.graph, prefill_graph, weights, threads=threads, prepack=prepack
        )

    def _open(self, model: str | bytes, prepack: bool) -> Any:
        assert isinstance(model, str)
        return self._load(*self._pieces_of(Path(model)), prepack)

    def _pieces_of(self, graph: Path) -> tuple[list[pieces.Piece], list[bytes]]:
        """The pieces of a graph of this rank and their models; EngineError when they are not this engine's."""
        file = graph.with_name(pieces.pieces_name(graph.name))
        content, models = pieces.read(file)
        config, rank = self._config, self._exchanger.rank
        found, wanted = (content.rank, content.ranks), (rank, config.mapping.ranks)
        if found != wanted or content.build != config.options.get("parallel_build"):
            raise EngineError(f"{file}: belongs to rank {found[0]} of {found[1]} of another build; rebuild the engine")
        return content.pieces, models

    def _load(self, content: list[pieces.Piece], models: list[bytes], prepack: bool) -> PiecewiseSession:
        loaded = []
        for piece, model in zip(content, models, strict=True):
            loaded.append(LoadedPiece(piece, self._one(piece, model, prepack) if model else None))
            self._tick()
        return PiecewiseSession(loaded, self._exchanger, self._tick, self._config.mapping.cp_size)

    def _one(self, piece: pieces.Piece, model: bytes, prepack: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 4  # failures arrive as exceptions
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._graph.parent.resolve())
        )
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for name in piece.weights:
            # Small constants are not in the list of weights; their bytes are in the piece.
            if name in self._weights:
                options.add_initializer(name, self._weights[name])
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            text = str(error).splitlines()[0]
            raise EngineError(f"{self._graph}: ONNX Runtime cannot load it: {text}", exit_code=ENVIRONMENT) from error

    def _with_taps(self) -> Any:
        """Pieces that also give out the tapped values; made when first asked for."""
        if self._tap_session is None:
            import onnx

            wanted, content, models = set(self._config.taps), [], []
            for piece, data in zip(*self._pieces_of(self._tapped_graph), strict=True):
                model = onnx.load_from_string(data) if data else onnx.ModelProto()
                names = [
                    name for node in model.graph.node for name in node.output if name in wanted - set(piece.outputs)
                ]
                for name in names:
                    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
                content.append(pieces.replace_outputs(piece, [*piece.outputs, *names]))
                models.append(model.SerializeToString() if data else b"")
            self._tap_session = self._load(content, models, self._tap_prepack)
        return self._tap_session
