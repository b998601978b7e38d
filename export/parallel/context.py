"""One rank's prefill graph when ranks share a chunk's tokens: context parallelism, LASP+ of the MiniMax-01 report (section 3.2.2).

Rank r of N takes tokens r*C .. (r+1)*C - 1 of every row, C = T/N; T must be a multiple of N, which padding gives. It leaves with the
states of the whole chunk, as every other rank does. Rules:

1. Inputs and outputs keep their names and dimensions: every rank is given the whole chunk and cuts its segment out of it. Positions,
   new lengths and the last key that attention sees become the segment's; embedding, norms, linear layers and experts see single
   tokens and stay as they are.
2. Lightning attention: a segment leaves the state U_r = sum over its tokens of decay^(tokens behind it) k v^T, beginning at zero: one
   product. All U are gathered (their size does not depend on T), and the chain S_(j+1) = decay^(n_j) S_j + U_j over the segments'
   lengths n_j gives the state S_r at which the rank's own recurrence begins, and S_N, the new state, the same on all ranks bit for
   bit. All exponents are 0 or negative. A segment without tokens has n_j = 0 and U_j = 0, and changes nothing.
3. Softmax attention: keys and values are gathered, which restores the padded chunk, and go into the cache as ever; the rank's queries
   begin at past + r*C.
4. Logits: the rank that holds a position has its row of the last hidden values; the others add zeros to it (all-reduce).

Legend: B batch, T tokens of the chunk, C of a segment, P positions with logits, D hidden, H heads, G key/value heads, K and V
channels of a head, N ranks that share the chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from export.contract import BATCH, POSITIONS, TOKENS
from export.errors import ExportError
from export.parallel.collective import ALL_GATHER, ALL_REDUCE, OPERATOR, all_gather, all_reduce
from export.parallel.plan import ShardingPlan
from export.verify import verify_structure

SEGMENT = "segment"  # the dimension C
INTEGER, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL


def split_context(model: ir.Model, plan: ShardingPlan, rank: int) -> ir.Model:
    """The prefill graph of `rank`; `model`, the graph that `export.parallel.shard` made for it, is left as it is.

    Raises:
        ExportError: the graph is not put together as the canonical one.
    """
    mine = model.clone()
    if plan.mapping.cp_size > 1:
        before = _collectives(mine)
        _Splitter(mine.graph, plan, rank).run()
        verify_structure(mine)
        expected = before | {
            ALL_REDUCE: before.get(ALL_REDUCE, 0) + 1,
            ALL_GATHER: before.get(ALL_GATHER, 0) + plan.config.num_layers,
        }
        if _collectives(mine) != expected:
            raise ExportError(f"the rank's graph has the collectives {_collectives(mine)}, expected {expected}")
    return mine


def _collectives(model: ir.Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.graph:
        if node.op_type == OPERATOR:
            operation = node.attributes["collective_operation"].as_string()
            found[operation] = found.get(operation, 0) + 1
    return found


class _Splitter:
    def __init__(self, graph: ir.Graph, plan: ShardingPlan, rank: int) -> None:
        self.graph, self.ranks, self.segment = graph, plan.mapping.cp_size, plan.mapping.cp_rank(rank)
        self.group = plan.mapping.cp_group(rank)
        self.inputs = {value.name: value for value in graph.inputs}

    def run(self) -> None:
        nodes = list(self.graph)
        for value in [value for node in nodes for value in node.outputs]:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(dim) for dim in value.shape])
        writes = [node for node in nodes if node.op_type == "TensorScatter"]
        self._cut_inputs(nodes[0])
        for node in writes:  # the cache is written from where the whole chunk begins
            node.replace_input_with(2, self.inputs["past_lengths"])
        for node in nodes:
            if node.op_type == "LinearAttention":
                self._linear_attention(node)
            elif node.op_type == "Attention":
                self._attention(node)
        rows = [node for node in nodes if node.op_type == "GatherElements"]
        if len(rows) != 1:
            raise ExportError(f"{len(rows)} GatherElements nodes, expected the one that chooses the rows with logits")
        self._chosen_rows(rows[0])

    def _cut_inputs(self, first: ir.Node) -> None:
        """The segment's ids, positions and lengths, for everything that reads the chunk's."""
        ids, new, past = (self.inputs[name] for name in ("input_ids", "new_lengths", "past_lengths"))
        positions = self.inputs["logit_positions"]
        uses = {value: list(value.uses()) for value in (ids, new, past, positions)}
        put = _Put(first, SEGMENT)
        tokens = put("Shape", ids, dims=[1], start=1, end=2)
        self.length = put("Div", tokens, put.integers(self.ranks), dims=[1])
        start = put("Mul", self.length, put.integers(self.segment), dims=[1])
        end = put("Add", start, self.length, dims=[1])
        mine_BC = put("Slice", ids, start, end, put.integers(1), dims=[BATCH, SEGMENT])
        begins_B = put("Add", past, start, dims=[BATCH])
        # Valid tokens of every segment: what the chunk has in front of its end, less what it has in front of its start.
        edges = [put("Mul", self.length, put.integers(*range(n, n + self.ranks)), dims=[self.ranks]) for n in (0, 1)]
        seen = [
            put("Min", put("Unsqueeze", edge, put.integers(1), dims=[self.ranks, 1]), new, dims=[self.ranks, BATCH])
            for edge in edges
        ]
        counts_NB = put("Sub", seen[1], seen[0], dims=[self.ranks, BATCH])
        count_1B = put("Slice", counts_NB, put.integers(self.segment), put.integers(self.segment + 1), dims=[1, BATCH])
        count_B = put("Squeeze", count_1B, put.integers(0), dims=[BATCH])
        self.counts_NB1 = put.floats(put("Unsqueeze", counts_NB, put.integers(2), dims=[self.ranks, BATCH, 1]))
        # Tokens of the segment behind each of its own; negative on padding, where k and v are zero.
        offsets_C = put("Range", put.integer(0), put("Squeeze", self.length, dims=[]), put.integer(1), dims=[SEGMENT])
        last_B1 = put("Unsqueeze", put("Sub", count_B, put.integer(1), dims=[BATCH]), put.integers(1), dims=[BATCH, 1])
        behind_BC = put("Sub", last_B1, offsets_C, dims=[BATCH, SEGMENT])
        behind_BC = put("Max", behind_BC, put.integer(0), dims=[BATCH, SEGMENT])
        self.behind_BC1 = put.floats(put("Unsqueeze", behind_BC, put.integers(2), dims=[BATCH, SEGMENT, 1]))
        # Positions with logits, counted from the segment's start; one outside it stands for some row of the segment.
        inside_BP = put("Sub", positions, start, dims=[BATCH, POSITIONS])
        self.held_BP = put(
            "And",
            put("GreaterOrEqual", inside_BP, put.integer(0), dims=[BATCH, POSITIONS], dtype=BOOL),
            put("Less", inside_BP, self.length, dims=[BATCH, POSITIONS], dtype=BOOL),
            dims=[BATCH, POSITIONS],
        )
        most = put("Sub", self.length, put.integer(1), dims=[1])
        at_BP = put("Max", inside_BP, put.integer(0), dims=[BATCH, POSITIONS])
        at_BP = put("Min", at_BP, most, dims=[BATCH, POSITIONS])
        for old, local in ((ids, mine_BC), (new, count_B), (past, begins_B), (positions, at_BP)):
            for use in uses[old]:
                use.node.replace_input_with(use.idx, local)

    def _linear_attention(self, node: ir.Node) -> None:
        _, k, v, past, decay = (_input(node, index) for index in range(5))
        heads, width = (_static(past, axis) for axis in (1, 2))
        put = _Put(node, f"{past.name}.{SEGMENT}")
        slopes = put.constant(_slopes(node, decay))  # negative: logarithms of the decay of one token
        state = [BATCH, heads, width, _static(past, 3)]
        # U of this segment.
        fade_BCH = put.exp(put("Mul", self.behind_BC1, slopes, dims=[BATCH, SEGMENT, heads]))
        fade_BCH1 = put("Unsqueeze", fade_BCH, put.integers(3), dims=[BATCH, SEGMENT, heads, 1])
        split = [BATCH, SEGMENT, heads, width]
        k_BCHK = put("Reshape", k, put.integers(0, 0, heads, width), dims=split)
        v_BCHV = put("Reshape", v, put.integers(0, 0, heads, state[3]), dims=[*split[:3], state[3]])
        faded_BCHK = put("Mul", k_BCHK, fade_BCH1, dims=split)
        k_BHKC = put("Transpose", faded_BCHK, dims=[BATCH, heads, width, SEGMENT], perm=[0, 2, 3, 1])
        v_BHCV = put("Transpose", v_BCHV, dims=[BATCH, heads, SEGMENT, state[3]], perm=[0, 2, 1, 3])
        left = put("MatMul", k_BHKC, v_BHCV, dims=state)
        every = self._gather(put, put("Unsqueeze", left, put.integers(0), dims=[1, *state]))
        # The chain over all segments.
        fade_NBH = put.exp(put("Mul", self.counts_NB1, slopes, dims=[self.ranks, BATCH, heads]))
        fade_NBH11 = put("Unsqueeze", fade_NBH, put.integers(3, 4), dims=[self.ranks, BATCH, heads, 1, 1])
        added = put.split(every, self.ranks, dims=[1, *state])
        fades = put.split(fade_NBH11, self.ranks, dims=[1, BATCH, heads, 1, 1])
        chain = [put("Unsqueeze", past, put.integers(0), dims=[1, *state])]
        for one, fade in zip(added, fades, strict=True):
            chain.append(put("Add", put("Mul", chain[-1], fade, dims=[1, *state]), one, dims=[1, *state]))
        # Taken out of one value, so that the first rank, whose recurrence begins at the old state, does not run ahead of the
        # exchange: the others would wait for its U until it had computed all layers.
        both = put("Concat", chain[self.segment], chain[-1], dims=[2, *state], axis=0)
        begin, end = (put("Squeeze", one, put.integers(0), dims=state) for one in put.split(both, 2, dims=[1, *state]))
        node.replace_input_with(3, begin)
        present, name = node.outputs[1], node.outputs[1].name
        present.name = f"{name}.{SEGMENT}"  # what the rank's own recurrence ends with; nobody needs it
        end.name = name
        self.graph.outputs[:] = [end if value is present else value for value in self.graph.outputs]

    def _attention(self, node: ir.Node) -> None:
        write_key, write_value = (_input(node, index).producer() for index in (1, 2))
        if write_key is None or write_value is None or write_key.op_type != "TensorScatter":
            raise ExportError(f"attention {node.name!r} does not read a cache that is written for it")
        key, value = _input(write_key, 1), _input(write_value, 1)
        groups, width = _static(key, 1), _static(key, 3)
        part = [BATCH, groups, SEGMENT, 2 * width]
        put = _Put(write_key, f"{key.name}.{SEGMENT}")
        both = put("Concat", key, value, dims=part, axis=-1)
        every = self._gather(put, put("Unsqueeze", both, put.integers(0), dims=[1, *part]))
        rows = put("Transpose", every, dims=[BATCH, groups, self.ranks, *part[2:]], perm=[1, 2, 0, 3, 4])
        joined = put("Reshape", rows, put.integers(0, 0, -1, 2 * width), dims=[BATCH, groups, TOKENS, 2 * width])
        keys, values = put.split(joined, 2, dims=[BATCH, groups, TOKENS, width], axis=-1)
        write_key.replace_input_with(1, keys)
        write_value.replace_input_with(1, values)

    def _chosen_rows(self, node: ir.Node) -> None:
        chosen = node.outputs[0]
        assert chosen.shape is not None
        uses, dims = list(chosen.uses()), list(chosen.shape)
        following = next(iter(use.node for use in uses))
        put = _Put(following, f"{chosen.name}.{SEGMENT}")
        held = put("Unsqueeze", self.held_BP, put.integers(2), dims=[BATCH, POSITIONS, 1])
        zero = put.constant(np.zeros([], np.float32), chosen.dtype)
        mine = put("Where", held, chosen, zero, dims=dims, dtype=chosen.dtype)
        summed = put.add(all_reduce(mine, self.ranks, self.group))
        for use in uses:
            use.node.replace_input_with(use.idx, summed)

    def _gather(self, put: _Put, value: ir.Value) -> ir.Value:
        return put.add(all_gather(value, self.ranks, self.group))


class _Put:
    """Adds nodes in front of `node`; every value gets a name, a type (that of its first input, if not said) and a shape."""

    def __init__(self, node: ir.Node, stem: str) -> None:
        assert isinstance(node.graph, ir.Graph)
        self.graph, self.node, self.stem, self.count = node.graph, node, stem, 0

    def __call__(
        self, operator: str, *inputs: ir.Value, dims: list[Any], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        kind = dtype or (INTEGER if operator == "Shape" else inputs[0].dtype)
        return self._finish(ir.node(operator, list(inputs), attributes or None), dims, kind)[0]

    def split(self, value: ir.Value, parts: int, *, dims: list[Any], axis: int = 0) -> list[ir.Value]:
        node = ir.node("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts)
        return self._finish(node, dims, value.dtype)

    def add(self, node: ir.Node) -> ir.Value:
        """A node that has its name, type and shape."""
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def exp(self, value: ir.Value) -> ir.Value:
        return self("Exp", value, dims=list(value.shape or []))

    def floats(self, value: ir.Value) -> ir.Value:
        return self("Cast", value, dims=list(value.shape or []), dtype=FLOAT, to=int(FLOAT))

    def integer(self, value: int) -> ir.Value:
        return self.constant(np.asarray(value, np.int64))

    def integers(self, *values: Any) -> ir.Value:
        return self.constant(np.asarray(values, np.int64))

    def constant(self, values: Any, dtype: ir.DataType | None = None) -> ir.Value:
        if dtype is not None:
            values = np.asarray(values, dtype.numpy())
        tensor = ir.tensor(values, dtype=dtype)
        return self._finish(ir.node("Constant", [], {"value": tensor}), list(tensor.shape), tensor.dtype)[0]

    def _finish(self, node: ir.Node, dims: list[Any], dtype: ir.DataType | None) -> list[ir.Value]:
        for value in node.outputs:
            self.count += 1
            value.name = f"{self.stem}.{node.op_type.lower()}.{self.count}"
            value.type, value.shape = None if dtype is None else ir.TensorType(dtype), ir.Shape(dims)
        self.graph.insert_before(self.node, node)
        return list(node.outputs)


def _renamed(dim: int | ir.SymbolicDim) -> int | str | None:
    """The dimension with the segment's length in place of the chunk's."""
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else dim.value.replace(TOKENS, SEGMENT)


def _slopes(node: ir.Node, decay: ir.Value) -> np.ndarray:
    """Log-decay per token of each head [H], negative: the constant factor of the log-decay."""
    product = decay.producer()
    for value in product.inputs if product is not None and product.op_type == "Mul" else ():
        source = value.producer() if value is not None else None
        if source is not None and source.op_type == "Constant":
            return source.attributes["value"].as_tensor().numpy()
    raise ExportError(f"the decay of {node.name!r} is not a product with constants")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ExportError(f"input {index} of {node.op_type} {node.name!r} is missing")
    return value


def _static(value: ir.Value, axis: int) -> int:
    dim = value.shape[axis] if value.shape is not None else None
    if not isinstance(dim, int):
        raise ExportError(f"{value.name!r} has no fixed dimension {axis}")
    return dim
