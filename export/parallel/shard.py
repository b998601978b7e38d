"""One rank's graph out of the canonical graph of the whole model.

Every rank's graph has the same nodes, inputs and outputs. Rules, each for the values that it names:

1. Weights take the shape of the rank's part (`export.parallel.plan`); states have the rank's heads.
2. A cut axis is followed from the weights through the operators below; the numbers of heads and widths that they carry (reshape
   targets, attributes, decay constants) become the rank's. An operator without a rule must not meet a cut value: that is an error.
3. A product over a cut axis (out_proj, o_proj) is a partial sum: an all-reduce follows.
4. The lightning norm takes its mean over all heads: its sum of squares, in fp32, is all-reduced before the division.
5. The experts keep the whole router's logits, so that routing is the same on every rank; `first_local_expert` says which experts the
   weights are. Their outputs, a partial sum in either way of cutting them, are all-reduced.
6. An embedding row that another rank holds is 0 here; the all-reduce fills it in.
7. Logits are gathered over the vocabulary. Where it does not divide by the ranks, it counts as the next size that does: the last
   weights have rows of zeros, and the logits of these are cut off behind the gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from export.contract import LOGITS
from export.errors import ExportError
from export.parallel.collective import OPERATOR, all_gather, all_reduce
from export.parallel.plan import ShardingPlan, rule_of
from export.verify import verify_structure

Cut = tuple[int, int]  # the axis of a value that is cut, and into how many different pieces
ELEMENTWISE = frozenset({"Add", "Cast", "Mul", "Sigmoid"})


def shard(model: ir.Model, plan: ShardingPlan, rank: int) -> ir.Model:
    """The graph of `rank`; `model` is left as it is. Initializers have a type and the rank's shape, but no bytes.

    Raises:
        ExportError: the graph holds something that the rules above do not know how to cut.
    """
    mine = model.clone()
    if plan.mapping.tp_size > 1:
        _Sharder(mine.graph, plan, rank).run()
        verify_sharded(mine, plan)
    return mine


def verify_sharded(model: ir.Model, plan: ShardingPlan) -> None:
    """Structure, and as many collectives of each kind as the plan says. Raises ExportError."""
    verify_structure(model)
    found: dict[str, int] = {}
    for node in model.graph:
        if node.op_type == OPERATOR:
            operation = node.attributes["collective_operation"].as_string()
            found[operation] = found.get(operation, 0) + 1
    expected: dict[str, int] = {}
    for item in plan.collectives():
        expected[item.operation] = expected.get(item.operation, 0) + item.count
    if found != expected:
        raise ExportError(f"the rank's graph has the collectives {found}, the plan says {expected}")


class _Sharder:
    def __init__(self, graph: ir.Graph, plan: ShardingPlan, rank: int) -> None:
        self.graph, self.plan, self.rank = graph, plan, plan.mapping.tp_rank(rank)
        self.ranks, self.group = plan.mapping.tp_size, plan.mapping.tp_group(rank)
        self.cuts: dict[ir.Value, Cut] = {}
        elementwise: dict[str, Callable[[ir.Node, Cut], None]] = dict.fromkeys(ELEMENTWISE, self._elementwise)
        self.rules: dict[str, Callable[[ir.Node, Cut], None]] = elementwise | {
            "Attention": lambda node, cut: self._cut(node.outputs[0], self.cuts[_input(node, 0)]),
            "Gather": self._embedding,
            "LinearAttention": self._linear_attention,
            "MatMul": self._matmul,
            "MoE": self._experts,
            "RMSNormalization": self._norm,
            "Reshape": self._reshape,
            "RotaryEmbedding": lambda node, cut: self._cut(node.outputs[0], cut),
            "Shape": self._shape,
            "Split": self._split,
            "TensorScatter": lambda node, cut: self._cut(node.outputs[0], cut),
            "Transpose": self._transpose,
        }

    def run(self) -> None:
        self._pad_logits()
        for name in self.plan.shapes:
            value = self.graph.initializers[name]
            value.const_value = None
            value.shape = ir.Shape(self.plan.held_shape(name))
            for axis, shared in rule_of(name).cuts:
                self.cuts.setdefault(value, (axis, self.plan.pieces(shared)))
        for value in self.graph.inputs:
            dims = self.plan.state_dims(self.rank).get(value.name or "") if value.name else None
            if dims is not None:
                self.cuts[value] = (1, self._pieces_of(value, dims))
                value.shape = ir.Shape(dims)
        for node in list(self.graph):
            cuts = [self.cuts[value] for value in node.inputs if value is not None and value in self.cuts]
            if not cuts:
                continue
            rule = self.rules.get(node.op_type)
            if rule is None:
                raise ExportError(f"no rule to cut the operator {node.op_type} ({node.name!r})")
            rule(node, cuts[0])

    def _pad_logits(self) -> None:
        """Give what is computed of the head the width that divides by the ranks."""
        whole = self.plan.config.vocab_size
        padded = -(-whole // self.ranks) * self.ranks
        values = [self.graph.initializers["lm_head.weight"]]
        while padded != whole and values:
            for node in [use.node for use in values.pop().uses()]:
                output = node.outputs[0]
                if output.shape is not None:
                    output.shape = ir.Shape([*output.shape[:-1], padded])
                values += [output] if output.name != LOGITS else []

    def _pieces_of(self, value: ir.Value, dims: tuple[int | str, ...]) -> int:
        assert value.shape is not None
        whole, part = value.shape[1], dims[1]
        assert isinstance(whole, int)
        assert isinstance(part, int)
        return whole // part

    def _cut(self, value: ir.Value, cut: Cut) -> None:
        """Record that `value` is cut, and give it the rank's shape."""
        axis, pieces = cut
        self.cuts[value] = cut
        if value.shape is not None:
            dims = list(value.shape)
            length = dims[axis]
            if not isinstance(length, int) or length % pieces:
                raise ExportError(
                    f"{value.name!r} of shape {value.shape} cannot be cut into {pieces} along axis {axis}"
                )
            dims[axis] = length // pieces
            value.shape = ir.Shape(dims)

    def _elementwise(self, node: ir.Node, cut: Cut) -> None:
        for value in node.inputs:
            # Beside a cut value stand values cut alike, or ones that are the same along the axis.
            if value is not None and self.cuts.get(value, cut) != cut:
                raise ExportError(f"{node.op_type} {node.name!r} meets values cut in different ways")
        self._cut(node.outputs[0], cut)

    def _transpose(self, node: ir.Node, cut: Cut) -> None:
        perm = list(node.attributes["perm"].as_ints())
        self._cut(node.outputs[0], (perm.index(cut[0]), cut[1]))

    def _split(self, node: ir.Node, cut: Cut) -> None:
        source = _input(node, 0)
        assert source.shape is not None
        if node.attributes["axis"].as_int() % len(source.shape) == cut[0]:
            raise ExportError(f"Split {node.name!r} splits the axis that ranks share")
        for output in node.outputs:
            self._cut(output, cut)

    def _shape(self, node: ir.Node, cut: Cut) -> None:
        start, end = (node.attributes[key].as_int() for key in ("start", "end"))
        if start <= cut[0] < end:
            raise ExportError(f"Shape {node.name!r} asks for the axis that ranks share")

    def _reshape(self, node: ir.Node, cut: Cut) -> None:
        """Both ways between [.., heads * K] and [.., heads, K]: what lies before the cut axis stays, so the axis keeps its place."""
        axis, pieces = cut
        target = _constant(_input(node, 1))
        if target is None:
            raise ExportError(f"the target of Reshape {node.name!r} is not constant")
        sizes = target.copy()
        if sizes[axis] > 0:
            sizes[axis] //= pieces
        self._replace_constant(node, 1, sizes)
        self._cut(node.outputs[0], cut)

    def _matmul(self, node: ir.Node, cut: Cut) -> None:
        x, weight = _input(node, 0), _input(node, 1)
        output = node.outputs[0]
        if weight not in self.cuts:
            raise ExportError(f"MatMul {node.name!r} multiplies a cut value by a whole weight")
        axis, pieces = self.cuts[weight]
        if axis == 0:  # [in, out] after the transpose: the sum runs over the ranks
            if x not in self.cuts or self.cuts[x][1] != pieces:
                raise ExportError(f"MatMul {node.name!r} multiplies a weight that is cut by a value that is not")
            self._exchange(output, all_reduce)
            return
        if x in self.cuts:
            raise ExportError(f"MatMul {node.name!r} multiplies two values cut in ways that do not belong together")
        assert output.shape is not None
        self._cut(output, (len(output.shape) - 1, pieces))
        if output.name == LOGITS:
            self._gather_logits(node)

    def _linear_attention(self, node: ir.Node, cut: Cut) -> None:
        pieces = self.cuts[_input(node, 0)][1]
        for key in ("q_num_heads", "kv_num_heads"):
            node.attributes[key] = ir.AttrInt64(key, node.attributes[key].as_int() // pieces)
        decay = _input(node, 4).producer()
        slopes = (
            None if decay is None else next((i for i, v in enumerate(decay.inputs) if _constant(v) is not None), None)
        )
        if decay is None or decay.op_type != "Mul" or slopes is None:
            raise ExportError(f"the decay of {node.name!r} is not a product with constants")
        whole = _constant(decay.inputs[slopes])
        assert whole is not None
        self._replace_constant(decay, slopes, np.split(whole, pieces)[self.rank * pieces // self.ranks])
        self._cut(decay.outputs[0], (2, pieces))
        self._cut(node.outputs[0], (2, pieces))
        self._cut(node.outputs[1], (1, pieces))

    def _norm(self, node: ir.Node, cut: Cut) -> None:
        x, weight = _input(node, 0), _input(node, 1)
        if x not in self.cuts or weight not in self.cuts:
            raise ExportError(f"RMSNormalization {node.name!r} has a cut input but not a cut weight, or the reverse")
        assert weight.shape is not None
        width = weight.shape.numpy()[0] * cut[1]
        build = _Builder(self.graph, node, x)
        wide = build.cast(x, ir.DataType.FLOAT)
        squares = build("ReduceSum", [build("Mul", [wide, wide]), build.integers([-1])], last=1, keepdims=1)
        reduced = self._insert_after(squares, all_reduce)
        build.after = reduced.producer()
        mean = build("Mul", [reduced, build.number(1.0 / width)], last=1)
        spread = build(
            "Sqrt", [build("Add", [mean, build.number(node.attributes["epsilon"].as_float())], last=1)], last=1
        )
        normed = build.cast(build("Div", [wide, spread]), x.dtype)
        result = build("Mul", [normed, weight])
        _take_place(node.outputs[0], result, self.graph)
        self.graph.remove(node, safe=True)
        self.cuts[result] = (2, cut[1])

    def _experts(self, node: ir.Node, cut: Cut) -> None:
        if self.plan.mapping.moe_ep_size > 1:
            first = self.plan.part(_named(node, 2), self.rank).ranges[0][0]
            node.attributes["first_local_expert"] = ir.AttrInt64("first_local_expert", first)
        self._exchange(node.outputs[0], all_reduce)

    def _embedding(self, node: ir.Node, cut: Cut) -> None:
        table, ids = _input(node, 0), _input(node, 1)
        output = node.outputs[0]
        start, end = self.plan.part(table.name or "", self.rank).ranges[0]
        build = _Builder(self.graph, node, ids, after=False)
        local = build("Sub", [ids, build.integer(start)])
        inside = build(
            "And",
            [
                build("GreaterOrEqual", [local, build.integer(0)], dtype=ir.DataType.BOOL),
                build("Less", [local, build.integer(end - start)], dtype=ir.DataType.BOOL),
            ],
            dtype=ir.DataType.BOOL,
        )
        node.replace_input_with(1, build("Where", [inside, local, build.integer(0)]))
        build = _Builder(self.graph, node, output)
        mask = build("Unsqueeze", [inside, build.integers([-1])], dtype=ir.DataType.BOOL, last=1)
        uses = list(output.uses())
        masked = build("Where", [mask, output, build.number(0.0, output.dtype)])
        for use in uses:
            use.node.replace_input_with(use.idx, masked)
        self._exchange(masked, all_reduce)

    def _gather_logits(self, node: ir.Node) -> None:
        local = node.outputs[0]
        assert local.shape is not None
        batch, positions, part = local.shape
        local.name = f"{LOGITS}.part"
        # all_gather joins along axis 0, so the vocabulary comes first for its time.
        first = ir.node("Transpose", [local], {"perm": [2, 0, 1]}, name="logits.vocabulary_first")
        first.outputs[0].name, first.outputs[0].type = "logits.vocabulary_first", local.type
        first.outputs[0].shape = ir.Shape([part, batch, positions])
        gathered = all_gather(first.outputs[0], self.ranks, self.group)
        last = ir.node("Transpose", [gathered.outputs[0]], {"perm": [1, 2, 0]}, name="logits.gathered")
        assert isinstance(part, int)
        whole = self.plan.config.vocab_size
        logits = last.outputs[0]
        logits.name, logits.type = LOGITS, local.type
        logits.shape = ir.Shape([batch, positions, part * self.ranks])
        self.graph.insert_after(node, [first, gathered, last])
        if part * self.ranks != whole:
            logits.name = f"{LOGITS}.padded"
            build = _Builder(self.graph, last, logits)
            bounds = [build.integers([number]) for number in (0, whole, 2)]
            logits = build("Slice", [logits, *bounds], last=whole)
            logits.name = LOGITS
        for index, value in enumerate(self.graph.outputs):
            if value is local:
                self.graph.outputs[index] = logits
        del self.cuts[local]

    def _exchange(self, value: ir.Value, make: Callable[[ir.Value, int, Sequence[int]], ir.Node]) -> None:
        """Let the users of `value` read what the collective makes of it."""
        uses = list(value.uses())
        result = self._insert_after(value, make)
        for use in uses:
            use.node.replace_input_with(use.idx, result)

    def _insert_after(self, value: ir.Value, make: Callable[[ir.Value, int, Sequence[int]], ir.Node]) -> ir.Value:
        producer = value.producer()
        assert producer is not None
        node = make(value, self.ranks, self.group)
        self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _replace_constant(self, node: ir.Node, index: int, values: np.ndarray) -> None:
        """A constant of its own for this input: the old one may serve other nodes too."""
        old = _input(node, index)
        new = ir.node("Constant", [], {"value": ir.tensor(values)})
        new.outputs[0].name = f"{node.outputs[0].name}.{index}.of_rank"
        new.outputs[0].type, new.outputs[0].shape = ir.TensorType(ir.tensor(values).dtype), ir.Shape(values.shape)
        self.graph.insert_before(node, new)
        node.replace_input_with(index, new.outputs[0])
        producer = old.producer()
        if producer is not None and not old.uses() and not old.is_graph_output():
            self.graph.remove(producer, safe=True)


class _Builder:
    """Adds nodes around `node`; outputs take type and shape from `like`, with another type or last dimension where given."""

    def __init__(self, graph: ir.Graph, node: ir.Node, like: ir.Value, *, after: bool = True) -> None:
        self.graph, self.before, self.like = graph, node, like
        self.after: ir.Node | None = node if after else None
        self.stem, self.count = like.name or "", 0

    def __call__(
        self,
        operator: str,
        inputs: list[ir.Value],
        *,
        dtype: ir.DataType | None = None,
        last: int | None = None,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes or None)
        value = self._add(node, dtype or (inputs[1] if operator == "Where" else inputs[0]).dtype or self.like.dtype)
        dims = list(self.like.shape or [])
        if operator == "Unsqueeze":
            dims = [*list(inputs[0].shape or []), 1]
        elif last is not None:
            dims[-1] = last
        value.shape = ir.Shape(dims)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """`value` in another type; itself when it has that type."""
        assert dtype is not None
        return value if value.dtype == dtype else self("Cast", [value], dtype=dtype, to=int(dtype))

    def number(self, value: float, dtype: ir.DataType | None = ir.DataType.FLOAT) -> ir.Value:
        assert dtype is not None
        return self._constant(ir.tensor(np.asarray(value, dtype=dtype.numpy()), dtype=dtype))

    def integer(self, value: int) -> ir.Value:
        return self._constant(ir.tensor(np.asarray(value, dtype=np.int64)))

    def integers(self, values: list[int]) -> ir.Value:
        return self._constant(ir.tensor(np.asarray(values, dtype=np.int64)))

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = self._add(ir.node("Constant", [], {"value": tensor}), tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        return value

    def _add(self, node: ir.Node, dtype: ir.DataType | None) -> ir.Value:
        self.count += 1
        value = node.outputs[0]
        value.name = f"{self.stem}.{node.op_type.lower()}.{self.count}"
        value.type = None if dtype is None else ir.TensorType(dtype)
        if self.after is None:
            self.graph.insert_before(self.before, node)
        else:
            self.graph.insert_after(self.after, node)
            self.after = node
        return value


def _take_place(old: ir.Value, new: ir.Value, graph: ir.Graph) -> None:
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    new.shape = old.shape if new.shape is None else new.shape
    new.name, old.name = old.name, None


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ExportError(f"input {index} of {node.op_type} {node.name!r} is missing")
    return value


def _named(node: ir.Node, index: int) -> str:
    return _input(node, index).name or ""


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a Constant node's output."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
        return None
    return producer.attributes["value"].as_tensor().numpy()
