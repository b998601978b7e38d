"""The PyTorch definition as a session: the original that engines are held against.

torch is imported by this module, so import the module lazily.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary, D hidden, E experts, G kv heads, S capacity,
H heads, K and V head dims.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engines.config import Checkpoint as CheckpointReference
from engines.config import EngineConfig, Limits, Port, StateTensor
from engines.errors import EngineError
from engines.interface import Positions, RowSnapshot, StepResult, check_start
from engines.vision.placed import PlacedImages
from export.contract import IMAGE_FEATURES, LOGITS, TOKEN_INPUTS, hidden_tap, image_inputs, router_tap, state_specs
from model_defs.text_model import TextModel
from mxcompile.backends.weights import Rounding, load_model, too_large

if TYPE_CHECKING:
    from engines.vision.pixels import PreparedImage
    from model_defs.checkpoint.reader import Checkpoint
    from mxcompile.backends.vision import PyTorchVision

TARGET = "pytorch"
FIRST_CAPACITY = 256
MAX_BATCH_SIZE = 64


class PyTorchSession:
    """`TextModel` behind `engines.interface.Session`. Logits, states and taps are given out as float32 whatever the dtype.

    `state` is always one that this session's `new_state` made.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        threads: int | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
        checkpoint: CheckpointReference | None = None,
        vision: PyTorchVision | None = None,
        streams: bool = False,
    ) -> None:
        """Args:
        model: with its weights; its dtype is the session's.
        threads: CPU threads of torch while this session computes; default: torch's own setting.
        max_seq_len: default: the model's max_position_embeddings.
        vision: the vision half, of a model whose configuration has one.
        streams: the model's matrices are read from the checkpoint whenever they are used.
        """
        self.streams = streams
        self.model = model.eval()
        self._threads = threads
        limit = model.config.max_position_embeddings if max_seq_len is None else max_seq_len
        self._vision = vision
        self._config = _describe(model, Limits(max_batch_size, limit, prefill_chunk), checkpoint, vision)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str] | Checkpoint,
        dtype: str = "float32",
        layers: int | None = None,
        quantize_experts: str | None = None,
        expert_parts: int = 1,
        quantize: str | None = None,
        int8_activations: bool = False,
        vision: bool = False,
        stream: bool | None = False,
        **options: Any,
    ) -> PyTorchSession:
        """Load a checkpoint folder (or an opened checkpoint).

        Args:
            dtype: of weights and activations; "float64" and "float32" widen the stored weights exactly.
            layers: take the first ones only.
            quantize_experts: "int8" rounds the experts' weights as an engine with int8 experts does.
            expert_parts: ranks that share each expert's inner width in such an engine.
            quantize: "int8" or "int4" rounds all large matrices as an engine built so does.
            int8_activations: round what goes into products with those as well, as such an engine does.
            vision: with the vision half, if the checkpoint has one (float32 and float64 only).
            stream: leave the matrices in the checkpoint and read them whenever they are used; slower, for models larger than memory.
                None: do so if the model takes more memory than there is.
            options: of the constructor.

        Raises CheckpointError or ConfigError for a bad checkpoint, EngineError for an unknown dtype.
        """
        from model_defs.checkpoint.reader import Checkpoint
        from model_defs.checkpoint.verify import require_complete

        rounding = Rounding(dtype, quantize_experts, quantize, expert_parts)
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        config = opened.config if vision else opened.config.text_only()
        config = config if layers is None else config.truncated(layers)
        require_complete(opened, config)
        reference = CheckpointReference(str(opened.folder), opened.fingerprint())
        stream = too_large(config, dtype) if stream is None else stream
        model = load_model(opened, config, rounding, stream)
        if int8_activations and quantize is not None:
            from mxcompile.backends.rounded_activations import round_activations

            round_activations(model, quantize)
        half = None
        if config.vision is not None:
            from mxcompile.backends.vision import PyTorchVision

            half = PyTorchVision.load(opened, dtype)
        return cls(model, checkpoint=reference, vision=half, streams=stream, **options)

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def max_seq_len(self) -> int:
        return self._config.limits.max_seq_len

    @property
    def max_batch_size(self) -> int:
        return self._config.limits.max_batch_size

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def new_state(self, batch_size: int) -> PyTorchState:
        if not 1 <= batch_size <= self.max_batch_size:
            raise EngineError(
                f"batch size {batch_size} is not within 1 and the session's max_batch_size {self.max_batch_size}"
            )
        return PyTorchState(self.model, batch_size, self.max_seq_len)

    def image_features(self, images: Sequence[PreparedImage]) -> np.ndarray:
        """See `engines.interface.ImageSession`."""
        if self._vision is None:
            raise EngineError("this model was loaded without a vision half and takes no images")
        with self._limited_threads():
            return self._vision.features(images)

    def prefill(self, prompts: Sequence[Sequence[int]], state: Any, chunk: int | None = None) -> np.ndarray:
        chunk = self._config.limits.prefill_chunk if chunk is None else chunk
        if chunk < 1:
            raise EngineError(f"the prefill chunk must be at least 1 token, not {chunk}")
        if len(prompts) != state.batch_size:
            raise EngineError(f"{len(prompts)} prompts for a state of {state.batch_size} rows")
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int64)
        self._check_lengths(state, lengths_B)
        logits_BN = np.zeros((len(prompts), self.vocab_size), np.float32)
        for start in range(0, int(lengths_B.max(initial=0)), chunk):
            new_B = np.clip(lengths_B - start, 0, chunk)
            ids_BT = np.zeros((len(prompts), int(new_B.max())), np.int64)
            for row, prompt in enumerate(prompts):
                ids_BT[row, : new_B[row]] = prompt[start : start + chunk]
            last_BN = self.forward(ids_BT, new_B, state).logits[:, 0]
            logits_BN[new_B > 0] = last_BN[new_B > 0]
        return logits_BN

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: Any) -> np.ndarray:
        tokens_B = np.asarray(tokens_B)
        if tokens_B.shape != (state.batch_size,):
            raise EngineError(f"decode takes one token for each of the {state.batch_size} rows, not {tokens_B.shape}")
        return self.forward(tokens_B[:, None], np.ones(len(tokens_B), np.int64), state).logits[:, 0]

    def forward(
        self,
        ids_BT: np.ndarray,
        new_lengths_B: np.ndarray | Sequence[int],
        state: Any,
        positions: Positions = "last",
        taps: bool = False,
    ) -> StepResult:
        ids_BT, new_B = np.asarray(ids_BT), np.asarray(new_lengths_B, np.int64)
        if ids_BT.ndim != 2 or len(ids_BT) != state.batch_size or new_B.shape != (state.batch_size,):
            raise EngineError(
                f"forward takes ids [batch, tokens] and one new length per row; the state has {state.batch_size} rows, "
                f"the ids are {ids_BT.shape} and the new lengths {new_B.shape}"
            )
        tokens = ids_BT.shape[1]
        if new_B.min() < 0 or new_B.max() > tokens:
            raise EngineError(f"new lengths {new_B.tolist()} do not lie within 0 and the {tokens} tokens given")
        valid_BT = np.arange(tokens) < new_B[:, None]
        self._check_ids(ids_BT[valid_BT])
        self._check_lengths(state, new_B)
        positions_BP = _positions(positions, new_B, tokens)
        meant_BP = (positions_BP >= 0) & (positions_BP < new_B[:, None])
        past_B = state.lengths.copy()
        state.reserve(int(past_B.max()) + tokens)
        images: tuple[torch.Tensor, ...] = ()
        if self.model.config.vision is not None:
            features_MD, places_BT = state.images.feeds(0, past_B, tokens)
            images = torch.from_numpy(features_MD).to(self.model.dtype), torch.from_numpy(places_BT)
        # Not inference_mode: its tensors could not be written to by `write_row` and `clear_row`.
        with torch.no_grad(), self._limited_threads():
            logits_BPN, state.tensors, tapped = self.model(
                torch.from_numpy(np.where(valid_BT, ids_BT, 0).astype(np.int64)),
                torch.from_numpy(new_B),
                torch.from_numpy(past_B),
                torch.from_numpy(np.where(meant_BP, positions_BP, 0)),
                state.tensors,
                *images,
            )
        state.advance(new_B)
        out: dict[str, np.ndarray] = {}
        if taps:
            for layer in range(self.model.config.num_layers):
                for name, tap in (
                    (hidden_tap(layer), tapped.hidden[layer]),
                    (router_tap(layer), tapped.router_logits[layer]),
                ):
                    out[name] = _numpy(tap)
                    out[name][~valid_BT] = 0
        logits = _numpy(logits_BPN)
        logits[~meant_BP] = 0
        return StepResult(logits, out)

    def hidden_if_routed(self, layer: int, ids: Sequence[int], router_logits_TE: np.ndarray) -> np.ndarray:
        """What `layer` would give out, float32 [T, D], for a fresh sequence `ids` if its router had given these logits.

        Tells a wrong router from a wrong attention before it: everything but the routing is this session's.
        """
        experts = self.model.get_submodule(f"layers.{layer}.block_sparse_moe")

        def rerouted(module: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
            router = torch.from_numpy(router_logits_TE).to(outputs[1].dtype)
            return module.mix(inputs[0], router), outputs[1]

        hook = experts.register_forward_hook(rerouted)
        try:
            state = self.new_state(1)
            result = self.forward(np.asarray([ids]), [len(ids)], state, positions="last", taps=True)
        finally:
            hook.remove()
        return result.taps[hidden_tap(layer)][0]

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise EngineError(f"token ids must be integers, not {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise EngineError(f"token id {wrong} lies outside the vocabulary of {self.vocab_size}")

    def _check_lengths(self, state: Any, new_B: np.ndarray) -> None:
        total_B = state.lengths + new_B
        over = np.flatnonzero((total_B > self.max_seq_len) & (new_B > 0))
        if len(over):
            row = int(over[0])
            raise EngineError(
                f"row {row} holds {state.lengths[row]} tokens and gets {new_B[row]} more: {total_B[row]} exceeds the "
                f"session's max_seq_len {self.max_seq_len}"
            )

    @contextlib.contextmanager
    def _limited_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self._threads is not None and self._threads != before:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


class PyTorchState:
    """What `batch_size` sequences remember; made by `PyTorchSession.new_state`. See `engines.interface.State`."""

    def __init__(self, model: TextModel, batch_size: int, max_seq_len: int) -> None:
        self._specs = state_specs(model.config)
        self._max_seq_len = max_seq_len
        self._lengths = np.zeros(batch_size, np.int64)
        self._capacity = FIRST_CAPACITY
        self.tensors = model.new_states(batch_size, self._capacity)
        self.images = PlacedImages(None if model.config.vision is None else model.config.hidden_size)

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        view = self._lengths.view()
        view.flags.writeable = False
        return view

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens, padding included."""
        if tokens <= self._capacity:
            return
        self._capacity = max(tokens, 2 * self._capacity)
        for index, spec in enumerate(self._specs):
            if spec.kind != "recurrent_state":
                old = self.tensors[index]
                batch, kv_heads, used, width = old.shape
                self.tensors[index] = old.new_zeros((batch, kv_heads, self._capacity, width))
                self.tensors[index][:, :, :used] = old

    def advance(self, new_lengths_B: np.ndarray) -> None:
        """Record that so many tokens were added to each row."""
        self._lengths += new_lengths_B
        self.images.passed(self._lengths)

    def place_images(self, row: int, positions_n: np.ndarray, features_nD: np.ndarray) -> None:
        """See `engines.interface.ImageState`."""
        row = self._row(row)
        self.images.put(row, positions_n, features_nD, int(self._lengths[row]))

    def recurrent(self, layer: int) -> np.ndarray:
        return _numpy(self._tensor(layer, "recurrent_state"))

    def key(self, layer: int) -> np.ndarray:
        return self._cache(layer, "key")

    def value(self, layer: int) -> np.ndarray:
        return self._cache(layer, "value")

    def read_row(self, row: int, start: int = 0) -> RowSnapshot:
        row = self._row(row)
        length = int(self._lengths[row])
        check_start(start, length)
        parts: dict[str, dict[int, np.ndarray]] = {"recurrent_state": {}, "key": {}, "value": {}}
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            whole = spec.kind == "recurrent_state"
            parts[spec.kind][spec.layer] = _numpy(tensor[row] if whole else tensor[row, :, start:length])
        return RowSnapshot(length, parts["recurrent_state"], parts["key"], parts["value"])

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        row = self._row(row)
        if not 0 <= snapshot.length <= self._max_seq_len:
            raise EngineError(
                f"the snapshot holds {snapshot.length} tokens, the session's max_seq_len is {self._max_seq_len}"
            )
        parts = {"recurrent_state": snapshot.recurrent, "key": snapshot.key, "value": snapshot.value}
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            wanted = list(tensor.shape[1:])
            if spec.kind != "recurrent_state":
                wanted[1] = snapshot.length
            array = parts[spec.kind].get(spec.layer)
            if array is None or list(array.shape) != wanted:
                found = "none" if array is None else list(array.shape)
                raise EngineError(
                    f"the snapshot's {spec.kind} of layer {spec.layer} is {found}, this session needs {wanted}"
                )
        self.reserve(snapshot.length)
        self.images.drop(row)
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            target = tensor[row] if spec.kind == "recurrent_state" else tensor[row, :, : snapshot.length]
            target.copy_(torch.from_numpy(np.array(parts[spec.kind][spec.layer])))
        self._lengths[row] = snapshot.length

    def clear_row(self, row: int) -> None:
        row = self._row(row)
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            if spec.kind == "recurrent_state":
                tensor[row] = 0
        self._lengths[row] = 0
        self.images.drop(row)

    def _row(self, row: int) -> int:
        if not 0 <= row < self.batch_size:
            raise EngineError(f"row {row} does not exist; the state has rows 0 to {self.batch_size - 1}")
        return row

    def _tensor(self, layer: int, kind: str) -> torch.Tensor:
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            if (spec.layer, spec.kind) == (layer, kind):
                return tensor
        raise EngineError(f"layer {layer} has no {kind} in this model")

    def _cache(self, layer: int, kind: str) -> np.ndarray:
        out = _numpy(self._tensor(layer, kind)[:, :, : int(self._lengths.max(initial=0))])
        for row, length in enumerate(self._lengths):
            out[row, :, length:] = 0
        return out


def _describe(
    model: TextModel, limits: Limits, checkpoint: CheckpointReference | None, vision: PyTorchVision | None
) -> EngineConfig:
    from mxcompile import __version__

    dtype = str(model.dtype).removeprefix("torch.")
    specs = state_specs(model.config)
    wide = "float64" if dtype == "float64" else "float32"
    layers = range(model.config.num_layers)
    return EngineConfig(
        mxcompile_version=__version__,
        target=TARGET,
        model=model.config.to_dict(),
        dtype=dtype,
        limits=limits,
        inputs=[
            Port(name, dtype if name == IMAGE_FEATURES else "int64", list(dims))
            for name, dims in (TOKEN_INPUTS | image_inputs(model.config)).items()
        ],
        outputs=[Port(LOGITS, wide, ["batch", "positions", model.config.vocab_size])],
        states=[
            StateTensor(
                layer=spec.layer,
                kind=model.config.layer_kinds[spec.layer],
                role=spec.kind,
                past=spec.input_name,
                present=spec.output_name,
                dtype=wide if spec.kind == "recurrent_state" else dtype,
                dims=list(spec.dims),
            )
            for spec in specs
        ],
        ranks=[],
        taps=[tap(layer) for layer in layers for tap in (hidden_tap, router_tap)],
        checkpoint=checkpoint,
        versions={"torch": torch.__version__},
        vision=None if vision is None else vision.half,
    )


def _positions(positions: Positions, new_B: np.ndarray, tokens: int) -> np.ndarray:
    """Indices into the T new tokens, int64 [B, P]; those that are no valid token lie outside 0 .. new length - 1."""
    if isinstance(positions, str):
        if positions == "last":
            return new_B[:, None] - 1
        if positions == "all":
            return np.broadcast_to(np.arange(tokens), (len(new_B), tokens))
        raise EngineError(f'positions must be "last", "all" or an array, not {positions!r}')
    array = np.asarray(positions)
    if array.ndim != 2 or len(array) != len(new_B) or not np.issubdtype(array.dtype, np.integer):
        raise EngineError(f"positions must be integers [batch, P], not {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= tokens):
        raise EngineError(f"positions must lie within 0 and {tokens - 1}, the new tokens given")
    return array.astype(np.int64)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy."""
    return tensor.to(torch.float32).numpy().copy()
