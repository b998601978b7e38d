"""Run a TensorRT engine: ragged prefill in chunks, decode through a CUDA graph, states on the device and in place.

The logic has run against a device of host memory and an engine that evaluates the lowered graph (tests/trt); it has never run on a
GPU.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary, R rows of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from engines import checks
from engines.config import EngineConfig
from engines.errors import ENVIRONMENT, EngineError
from engines.interface import State, StepResult
from engines.plan import Run
from engines.ragged import RaggedSession
from engines.tensorrt.bindings import StepShapes
from engines.tensorrt.books import Books
from engines.tensorrt.loading import load_weights
from engines.tensorrt.profiles import DECODE
from engines.tensorrt.state import TrtState
from engines.weights import StoredWeight

_TOKEN_INPUTS = ("input_ids", "new_lengths", "past_lengths", "logit_positions")


class TrtSession(RaggedSession):
    """A loaded engine. See `engines.interface.Session`.

    `device`: `engines.tensorrt.device.CudaDevice` or one that does the same. `engine`: TensorRT's ICudaEngine. `weights`: the engine's
    weight inputs, copied to the device here, a part at a time. `communicator`: of a rank (`engines.tensorrt.nccl.Communicator`); every
    rank must then make the same calls in the same order. `tick`: called whenever there is progress.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: Any,
        engine: Any,
        weights: Sequence[StoredWeight],
        communicator: Any = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        device = Books(device)
        self._config, self._device, self._engine = config, device, engine
        self._communicator, self._tick = communicator, tick
        self._max_step_tokens = config.limits.prefill_chunk
        self._max_step_positions = int(config.options["max_positions"])
        self._contexts = [self._context(profile) for profile in range(2)]
        limits, positions = config.limits, int(config.options["max_positions"])
        widths = {"input_ids": limits.prefill_chunk, "logit_positions": positions}
        self._inputs = {
            name: device.allocate(limits.max_batch_size * widths.get(name, 1) * 8) for name in _TOKEN_INPUTS
        }
        self._logits = device.allocate(limits.max_batch_size * positions * config.vocab_size * 4)
        self._taps = {name: self._tap(name) for name in config.taps}
        self._weights = load_weights(device, weights, tick)
        for context in self._contexts:
            for name, address in self._addresses().items():
                _check(context.set_tensor_address(name, address), f"binding {name}")
        # The decode step that the graph replays; any other step drops it.
        self._graph: tuple[Any, Any] | None = None
        self._last_decode: Any = None

    def device_memory(self, reset: bool = False) -> dict[str, int | None]:
        """Memory of the device in bytes; see `engines.tensorrt.books.Books.memory`."""
        return self._device.memory(reset)

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError("TensorRT made no execution context; the GPU's memory may be full", exit_code=ENVIRONMENT)
        _check(context.set_optimization_profile_async(profile, self._device.stream), f"choosing profile {profile}")
        self._device.synchronize()
        if self._communicator is not None:  # waits for the other ranks
            _check(context.set_communicator(self._communicator.capsule()), "joining the other ranks")
        self._tick()
        return context

    def _addresses(self) -> dict[str, int]:
        """Of everything that every step binds alike."""
        taps = {name: address for name, (address, _, _) in self._taps.items()}
        return self._inputs | self._weights | taps | {"logits": self._logits}

    def _tap(self, name: str) -> tuple[int, np.dtype, int]:
        """Room for a tapped value [B, T, width], its type and its width."""
        port = next((port for port in self._config.outputs if port.name == name), None)
        if port is None or not isinstance(port.dims[-1], int):
            raise EngineError(f"the engine gives out no {name}; rebuild the engine")
        dtype, width, limits = np.dtype(port.dtype), port.dims[-1], self._config.limits
        return (
            self._device.allocate(limits.max_batch_size * limits.prefill_chunk * width * dtype.itemsize),
            dtype,
            width,
        )

    def new_state(self, batch_size: int) -> TrtState:
        return TrtState(self._config, self._device, checks.batch_within(batch_size, self.max_batch_size))

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: State) -> np.ndarray:
        tokens_B = checks.one_token_per_row(tokens_B, state.batch_size)
        self._check_ids(tokens_B)
        ones_B = np.ones(state.batch_size, np.int64)
        self._check_lengths(self._own(state), ones_B)
        run = Run(0, state.batch_size, 1)
        return self._step(run, tokens_B[:, None], ones_B, np.zeros((state.batch_size, 1), np.int64), state).logits[:, 0]

    def _own(self, state: State) -> TrtState:
        checks.own(isinstance(state, TrtState) and state.config is self._config)
        return cast(TrtState, state)

    def _step(
        self, run: Run, ids_BT: np.ndarray, new_B: np.ndarray, wanted_RP: np.ndarray, state: Any, taps: bool = False
    ) -> StepResult:
        rows, positions = (run.first, run.end), wanted_RP.shape[1]
        shapes = StepShapes(rows, run.tokens, max(positions, 1))
        new_R = new_B[slice(*rows)]
        feeds = {
            "input_ids": ids_BT[slice(*rows), : run.tokens],
            "new_lengths": new_R,
            "past_lengths": state.lengths[slice(*rows)],
            "logit_positions": wanted_RP if positions else np.zeros((shapes.batch, 1)),
        }
        for name, array in feeds.items():
            self._device.upload(self._inputs[name], np.ascontiguousarray(array, np.int64))
        self._run(shapes, state)
        state.advance(rows, new_R)
        logits_RPN = np.empty((shapes.batch, shapes.positions, self.vocab_size), np.float32)
        assert logits_RPN.nbytes == shapes.logits_bytes(self.vocab_size)
        self._device.download(logits_RPN, self._logits)
        found = {}
        for name, (address, dtype, width) in self._taps.items() if taps else ():
            tap_RTW = np.empty((shapes.batch, run.tokens, width), dtype)
            self._device.download(tap_RTW, address)
            found[name] = tap_RTW.astype(np.float32)
        self._tick()
        return StepResult(logits_RPN[:, :positions], found)

    def _run(self, shapes: StepShapes, state: TrtState) -> None:
        """Enqueue one step. A decode step that comes again is captured after its second run, and replayed from its third:
        TensorRT wants one plain run at the shapes of a graph, and a graph must not outlive a change of its context's shapes. Steps of
        several ranks are not captured: whether exchanges may be is for a machine with GPUs to say.
        """
        bound = list(state.addresses(shapes.rows))
        key = (shapes, tuple(bound)) if shapes.profile == DECODE and self._communicator is None else None
        if key is not None and self._graph is not None and self._graph[0] == key:
            self._device.launch(self._graph[1])
            return
        context = self._contexts[shapes.profile]
        for name, dims in (shapes.of_inputs() | shapes.of_states(state.layouts)).items():
            _check(context.set_input_shape(name, dims), f"taking {name} of shape {list(dims)}")
        for past, present, address in bound:
            _check(context.set_tensor_address(past, address), f"binding {past}")
            _check(context.set_tensor_address(present, address), f"binding {present}")

        def enqueue() -> None:
            _check(context.execute_async_v3(self._device.stream), "running a step; its state is lost")

        enqueue()
        if key is None:
            return
        if self._graph is not None:
            self._device.synchronize()
            self._device.release(self._graph[1])
            self._graph = None
        if key == self._last_decode:
            self._graph = (key, self._device.capture(enqueue))
        self._last_decode = key


def _check(done: bool, doing: str) -> None:
    if not done:
        raise EngineError(f"TensorRT failed {doing}", exit_code=ENVIRONMENT)
