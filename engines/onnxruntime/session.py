"""Run an ONNX Runtime engine: ragged prefill in chunks, single-token decode, states in place.

Needs numpy and onnxruntime (ml_dtypes for 16-bit types); `onnx` is imported only when taps are asked for.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary, R rows of one run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import onnxruntime as ort

from engines import checks
from engines.config import EngineConfig
from engines.directory import read_config, verify_files
from engines.errors import ENVIRONMENT, EngineError
from engines.interface import State, StepResult
from engines.onnxruntime.devices import CPU, check_started, providers
from engines.onnxruntime.state import OrtState
from engines.onnxruntime.vision import OrtTower, Steps, image_width
from engines.plan import Run
from engines.ragged import RaggedSession
from engines.vision.layout import check_half
from engines.vision.pixels import PreparedImage
from engines.weights import map_weights

if TYPE_CHECKING:
    from engines.onnxruntime.cuda import DeviceState

MINIMUM_ORT = (1, 31)
PREFILL_GRAPH_FROM = 8  # tokens of a run (rows times tokens) from which the prefill graph is faster
# The same where experts are quantized by blocks. QMoE gives threads whole experts; products of few rows each, one after the other,
# leave a second thread nothing (docs/quantization.md).
QUANTIZED_PREFILL_FROM = 128
_TAP = "float32."  # begins the name of a tapped 16-bit value as float32
Verify = Literal["quick", "full"]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    prepack: bool = True,
    verify: Verify = "quick",
    checkpoint: str | os.PathLike[str] | None = None,
    rank: int = 0,
) -> OrtSession:
    """Open an engine directory.

    Args:
        threads: of ONNX Runtime; default: the CPUs this process may use.
        prepack: let ONNX Runtime keep rearranged copies of linear and expert weights (as much memory again, not
            shared between processes). Without it several tokens at once take up to twice the time. A model quantized as a
            whole then widens its weights at every step and computes in fp32, exactly and 10 to 100 times slower.
        verify: "quick" checks files above 64 MiB by size and samples, "full" reads every byte.
        checkpoint: where the checkpoint lies now, if it was moved since the build.
        rank: which rank's files to load.

    Raises EngineError: not an engine, damaged, of another target, or ONNX Runtime missing or too old (exit code 3).
    """
    folder = Path(path)
    config = read_config(folder)
    if config.target != "onnxruntime":
        raise EngineError(f"{folder}: built for {config.target}, not for onnxruntime")
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < MINIMUM_ORT:
        need = ".".join(map(str, MINIMUM_ORT))
        raise EngineError(f"onnxruntime {ort.__version__} is too old, {need} is needed", exit_code=ENVIRONMENT)
    verify_files(folder, config, whole=verify == "full")
    files = next((files for files in config.ranks if files.rank == rank), None)
    if files is None or files.weights is None:
        raise EngineError(f"{folder}: has no rank {rank}")
    moved = Path(checkpoint) if checkpoint is not None else None
    weights = map_weights(folder, config, files.weights, moved, whole=verify == "full")
    prefill_graph = folder / files.prefill_graph if files.prefill_graph is not None else None
    vision = config.vision
    if vision is not None:
        check_half(vision, config.vocab_size)

    def vision_weights() -> dict[str, np.ndarray]:
        assert vision is not None
        return map_weights(folder, config, vision.weights, moved, whole=verify == "full")

    return OrtSession(
        config,
        folder / files.graph,
        prefill_graph,
        weights,
        threads=threads,
        prepack=prepack,
        vision_weights=vision_weights if vision is not None else None,
    )


class OrtSession(RaggedSession):
    """A loaded engine. See `engines.interface.Session`."""

    def __init__(
        self,
        config: EngineConfig,
        graph: Path,
        prefill_graph: Path | None,
        weights: dict[str, np.ndarray],
        *,
        threads: int | None = None,
        prepack: bool = True,
        vision_weights: Callable[[], dict[str, np.ndarray]] | None = None,
    ) -> None:
        self._config = config
        self._graph = graph
        self._threads = threads or len(os.sched_getaffinity(0))
        self._wanted = str(config.options.get("device", CPU))
        self._device = self._open_device() if self._wanted != CPU else None
        # ONNX Runtime uses these bytes where they lie, so they live as long as the session.
        if self._device is None:
            self._weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
            self._arrays = weights
        else:
            from engines.onnxruntime.cuda import upload

            self._weights = {name: upload(self._device, array) for name, array in weights.items()}
        self._prepack = prepack
        self._pairs = [(spec.past, spec.present) for spec in config.states]
        self._session = self._open(str(graph), prepack)
        self._prefill_session = self._session if prefill_graph is None else self._open(str(prefill_graph), prepack)
        self._tap_session: ort.InferenceSession | None = None
        self._image_width = image_width(config)
        self._vision_weights = vision_weights
        self._tower: OrtTower | None = None

    def _open_device(self) -> Any:
        from engines.onnxruntime.cuda import open_device

        providers(self._wanted)  # says what is missing before anything is copied
        return open_device()

    def new_state(self, batch_size: int) -> OrtState | DeviceState:
        batch_size = checks.batch_within(batch_size, self.max_batch_size)
        if self._device is None:
            return OrtState(self._config, batch_size)
        from engines.onnxruntime.cuda import DeviceState

        return DeviceState(self._config, self._device, batch_size)

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: State) -> np.ndarray:
        state = self._own(state)
        tokens_B = checks.one_token_per_row(tokens_B, state.batch_size)
        self._check_ids(tokens_B)
        longest = int(state.lengths.max()) + 1
        if longest > self.max_seq_len:
            self._check_lengths(state, np.ones(state.batch_size, np.int64))
        if state.images:
            return self.forward(tokens_B[:, None], np.ones(state.batch_size, np.int64), state).logits[:, 0]
        state.reserve(longest)
        step = self._single_step(state, (0, state.batch_size))
        step.ids_RT[:, 0] = tokens_B
        step.new_R[:] = 1
        return self._run_single(step, state)[:, 0].copy()

    @property
    def _int8_activations(self) -> bool:
        return "activations" in (self._config.quantization or {})

    def image_features(self, images: Sequence[PreparedImage]) -> np.ndarray:
        """What the images put into a prompt, one after the other, float32 [tokens, D]; `State.place_images` takes it.

        The vision graph is opened on the first call, also for no images. Raises EngineError when the engine has none.
        """
        return self._opened_tower().features(images)

    def image_steps(self, image: PreparedImage) -> Steps:
        """`image_features` of one image in steps, of which each runs the vision graph once, on a few tiles."""
        return self._opened_tower().steps(image)

    def _opened_tower(self) -> OrtTower:
        vision = self._config.vision
        if vision is None or self._vision_weights is None or self._image_width is None:
            raise EngineError("this engine has no vision half and takes no images")
        if self._tower is None:
            folder, weights = self._graph.parent, self._vision_weights()
            # On the CPU also beside a text model on a GPU: its weights are in host memory, and its result goes there anyway.
            self._tower = OrtTower(folder, vision, weights, self._image_width, threads=self._threads, device=CPU)
        return self._tower

    def _own(self, state: State) -> OrtState | DeviceState:
        checks.own(hasattr(state, "steps") and getattr(state, "config", None) is self._config)
        return cast("OrtState | DeviceState", state)

    def _step(
        self,
        run: Run,
        ids_BT: np.ndarray,
        new_B: np.ndarray,
        wanted_RP: np.ndarray,
        state: Any,
        taps: bool = False,
    ) -> StepResult:
        """One run of the graph over rows of one length class; advances the state."""
        rows = (run.first, run.end)
        new_R, past_R = new_B[slice(*rows)], state.lengths[slice(*rows)].copy()
        state.reserve(int(past_R.max()) + run.tokens)
        if run.tokens == 1 and wanted_RP.shape[1] == 1 and not taps and not state.images:
            step = self._single_step(state, rows)
            step.ids_RT[:, 0] = ids_BT[slice(*rows), 0]
            step.new_R[:] = new_R
            return StepResult(self._run_single(step, state))
        ids_RT = np.ascontiguousarray(ids_BT[slice(*rows), : run.tokens])
        feeds = {
            "input_ids": ids_RT,
            "new_lengths": np.ascontiguousarray(new_R),
            "past_lengths": past_R,
            "logit_positions": np.ascontiguousarray(wanted_RP),
        }
        if self._image_width is not None:
            features_MD, places_RT = state.images.feeds(run.first, past_R, run.tokens)
            feeds |= {"image_features": features_MD, "image_positions": places_RT}
        session, names = (self._with_taps(), self._config.taps) if taps else (self._fastest(*ids_RT.shape), [])
        binding = self._bind(session, feeds, state, rows)
        logits_RPN = np.empty((*wanted_RP.shape, self.vocab_size), np.float32)
        if logits_RPN.size:
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits_RPN))
        else:
            binding.bind_output("logits", "cpu")
        for name in names:
            binding.bind_output(name if self._config.dtype == "float32" else _TAP + name, "cpu")
        self._run(session, binding)
        state.advance(rows, new_R)
        found = binding.get_outputs()[-len(names) :] if names else []
        return StepResult(logits_RPN, {n: v.numpy() for n, v in zip(names, found, strict=True)})

    def _fastest(self, rows: int, tokens: int) -> ort.InferenceSession:
        """The graph to run this many tokens of each row with."""
        start = QUANTIZED_PREFILL_FROM if self._int8_activations else PREFILL_GRAPH_FROM
        return self._prefill_session if rows * tokens >= start else self._session

    def _bind(
        self,
        session: ort.InferenceSession,
        feeds: dict[str, np.ndarray],
        state: OrtState | DeviceState,
        rows: tuple[int, int],
    ) -> ort.IOBinding:
        """Bind feeds, and each state's buffer as both its input and its output."""
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        if isinstance(state, OrtState):
            values = state.values(rows)
            for past, present in self._pairs:
                binding.bind_ortvalue_input(past, values[past])
                binding.bind_ortvalue_output(present, values[past])
            return binding
        state.bind(binding, rows)
        return binding

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        if self._device is not None:
            self._device.synchronize()
        _run(session, binding)

    def _single_step(self, state: OrtState | DeviceState, rows: tuple[int, int]) -> _SingleStep:
        step = state.steps.get(rows)
        if not isinstance(step, _SingleStep):
            step = state.steps[rows] = _SingleStep(self, state, rows)
        return step

    def _run_single(self, step: _SingleStep, state: OrtState | DeviceState) -> np.ndarray:
        """Run a prepared single-token step; its logits buffer [R, 1, N] is overwritten by the next one."""
        step.past_R[:] = state.lengths[slice(*step.rows)]
        self._run(step.session, step.binding)
        state.advance(step.rows, step.new_R)
        return step.logits_RPN

    def _open(self, model: str | bytes, prepack: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # failures arrive as exceptions
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(model, bytes):  # where to look for the placeholder file of weights
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(self._graph.parent.resolve()))
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        try:
            session = ort.InferenceSession(model, options, providers=providers(self._wanted))
        except Exception as error:
            text = str(error).splitlines()[0]
            raise EngineError(f"{self._graph}: ONNX Runtime cannot load it: {text}", exit_code=ENVIRONMENT) from error
        check_started(session, self._wanted)
        return session

    @property
    def _tap_prepack(self) -> bool:
        """Packed weights cost memory, but a model quantized as a whole computes something else without."""
        return self._int8_activations and self._prepack

    def _with_taps(self) -> ort.InferenceSession:
        """A second session that also gives out the tapped values; shares the weights, so it costs little memory."""
        if self._tap_session is None:
            import onnx

            model = onnx.load(str(self._graph), load_external_data=False)
            for name in self._config.taps:
                if self._config.dtype != "float32":
                    model.graph.node.append(
                        onnx.helper.make_node("Cast", [name], [_TAP + name], to=onnx.TensorProto.FLOAT)
                    )
                    name = _TAP + name
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
            self._tap_session = self._open(model.SerializeToString(), self._tap_prepack)
        return self._tap_session


class _SingleStep:
    """Everything bound for one token on each of some rows; only numbers in its buffers change between steps."""

    def __init__(self, owner: OrtSession, state: OrtState | DeviceState, rows: tuple[int, int]) -> None:
        count = rows[1] - rows[0]
        self.rows = rows
        self.ids_RT = np.zeros((count, 1), np.int64)
        self.new_R, self.past_R = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.logits_RPN = np.zeros((count, 1, owner.vocab_size), np.float32)
        self._positions_RP = np.zeros((count, 1), np.int64)
        feeds: dict[str, Any] = {
            "input_ids": self.ids_RT,
            "new_lengths": self.new_R,
            "past_lengths": self.past_R,
            "logit_positions": self._positions_RP,
        }
        if owner._image_width is not None:
            feeds["image_features"] = np.zeros((1, owner._image_width), np.float32)
            feeds["image_positions"] = np.full((count, 1), -1, np.int64)
        self.session = owner._fastest(count, 1)
        self.binding = owner._bind(self.session, feeds, state, rows)
        self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits_RPN))


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime failed during a step; its state is lost: {str(error).splitlines()[0]}", exit_code=ENVIRONMENT
        ) from error
