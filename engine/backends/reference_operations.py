"""The operations of an `exact-int8` graph, in integers.

Each function takes the tensors that go into a node and returns those that come out, and refuses,
by the node's name, whatever float32 could not do without rounding:

- a scale must be a power of two;
- a single result must be an integer of at most 2**24 steps of its unit, common factors taken out;
- a sum of terms must stay below 2**24 steps of its finest unit even with every term at its
  magnitude: then no order of adding rounds, fused or not.

Two operations may round, once and correctly, in float32: Sqrt and Div.

Source: ONNX operators of the default set, versions 19 to 21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from engine.backends import dyadic as exact
from engine.backends.dyadic import LIMIT, Dyadic, InexactError, dyadic
from engine.backends.qdq_graph import Node, Value
from engine.backends.tensor_moves import MOVES, move

Inputs = Sequence[Value | None]

# Numbers of TensorProto.DataType.
CAST_TYPES: Final = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64"}


def real(node: Node, value: Value | None) -> Dyadic:
    """An input that must be float32."""
    if not isinstance(value, Dyadic):
        node.refuse("an input of a type that this operation does not take", expected="float32")
    return value


def whole(node: Node, value: Value | None) -> np.ndarray:
    """An input that must be an integer tensor."""
    if not isinstance(value, np.ndarray):
        node.refuse("an input of a type that this operation does not take", expected="integers")
    return value


def within(node: Node, values: np.ndarray, dtype: str) -> np.ndarray:
    """int64 values as integers of a type, which must hold them."""
    values, limits = np.asarray(values), np.iinfo(dtype)
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        node.refuse(
            f"an overflow of {dtype}",
            expected=f"{limits.min} to {limits.max}",
            found=f"{values.min()} to {values.max()}",
        )
    return values.astype(dtype)


def exponents(node: Node, scale: Value | None) -> np.ndarray:
    """Exponents of a scale, each of which must be a power of two."""
    found = real(node, scale)
    odd, e = exact.odd_parts(found.m, found.e)
    for at in np.flatnonzero(odd.ravel() != 1)[:1]:
        node.refuse(
            "a scale that is no power of two",
            expected="2**e",
            found=repr(float(exact.to_float(found).ravel()[at])),
            fix="quantise with power-of-two scales, or declare the numerics as tolerance",
        )
    return np.broadcast_to(e, odd.shape)


def quantize_linear(node: Node, inputs: Inputs) -> list[Value]:
    """uint8, per tensor: round half to even, add the zero point, saturate."""
    x, scale, zero = (*inputs, None)[:3]
    exponent, offset = quantisation(node, scale, zero)
    return [exact.quantise(real(node, x), exponent, offset)]


def quantisation(node: Node, scale: Value | None, zero: Value | None) -> tuple[int, int]:
    """Exponent and zero point of a QuantizeLinear."""
    e = exponents(node, scale)
    offset = np.zeros((), dtype=np.uint8) if zero is None else whole(node, zero)
    if e.size != 1 or offset.size != 1 or offset.dtype != np.uint8:
        node.refuse(
            "only uint8 per tensor is exact on every backend",
            expected="one scale and one uint8 zero point",
            found=f"{e.size} scales, {offset.size} zero points of {offset.dtype}",
        )
    if node.attributes.get("block_size", 0) or node.attributes.get("output_dtype", 2) not in (0, 2):
        node.refuse("a QuantizeLinear in blocks or to another type", expected="uint8 per tensor")
    return int(e.flat[0]), int(offset.flat[0])


def dequantize_linear(node: Node, inputs: Inputs) -> list[Value]:
    """``(q - zero point) * scale``: uint8 per tensor; int8 and int32 also per channel."""
    q, scale, zero = (*inputs, None)[:3]
    codes, e = whole(node, q), exponents(node, scale)
    offset = np.zeros((), dtype=codes.dtype) if zero is None else whole(node, zero)
    if node.attributes.get("block_size", 0) or codes.dtype.name not in ("uint8", "int8", "int32"):
        node.refuse("a DequantizeLinear in blocks or of another type", found=codes.dtype.name)
    if e.size == 1 and offset.size == 1:
        return [dyadic(codes.astype(np.int64) - int(offset.flat[0]), e.reshape(()))]
    axis = node.attributes.get("axis", 1)
    if (
        codes.dtype == np.uint8
        or not -codes.ndim <= axis < codes.ndim
        or e.shape != (codes.shape[axis],)
        or offset.shape not in ((), e.shape)
    ):
        node.refuse(
            "scales that do not fit",
            expected="one for a uint8 tensor, or one for each channel of int8 or int32",
            found=f"{e.size} for {codes.dtype} {list(codes.shape)}, axis {axis}",
        )
    shape = [1] * codes.ndim
    shape[axis] = len(e)
    offset = offset.astype(np.int64).reshape(shape if offset.ndim else ())
    return [dyadic(codes.astype(np.int64) - offset, e.reshape(shape))]


def gemm(node: Node, inputs: Inputs) -> list[Value]:
    """``a b' + c``."""
    a, b, c = gemm_inputs(node, inputs)
    y = exact.matmul(a, b)
    y = y if c is None else exact.add(y, c)
    # Most often the largest inputs of all rows together are small enough: one product tells.
    largest = Dyadic(np.abs(a.m).max(axis=0, keepdims=True), a.e) if a.one_unit else None
    if largest is None or sum_terms(largest, b, c).m.max(initial=0) >= LIMIT:
        check_terms(sum_terms(a, b, c))
    return [y]


def gemm_inputs(node: Node, inputs: Inputs) -> tuple[Dyadic, Dyadic, Dyadic | None]:
    """The operands of a Gemm, the second turned: (n, k), (k, m), and (m,) or such."""
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    found = tuple(node.attributes.get(name, default) for name, default in defaults.items())
    if found != (1.0, 1.0, 0, 1):
        node.refuse("another Gemm", expected="alpha=beta=1, transA=0, transB=1", found=found)
    a, b, c = (*inputs, None)[:3]
    left, right = real(node, a), real(node, b)
    if left.m.ndim != 2 or right.m.ndim != 2 or left.shape[1] != right.shape[1]:
        node.refuse("shapes that do not fit", found=f"{left.shape} and {right.shape}")
    turned = Dyadic(right.m.T, right.e.T)
    return left, turned, None if c is None else real(node, c)


def sum_terms(a: Dyadic, b: Dyadic, c: Dyadic | None) -> Dyadic:
    """Sum of the magnitudes of all terms of ``a @ b + c``, in the finest unit of any."""
    terms = exact.matmul(magnitude(a), magnitude(b))
    return terms if c is None else exact.add(terms, magnitude(c))


def magnitude(x: Dyadic) -> Dyadic:
    """``|x|``."""
    return Dyadic(np.abs(x.m), x.e)


def check_terms(terms: Dyadic) -> None:
    """Whether a sum of these magnitudes is exact in any order.

    Raises
    ------
    InexactError
        If it could reach 2**24 steps.
    """
    greatest = int(terms.m.max(initial=0))
    if greatest >= LIMIT:
        raise InexactError(f"terms that add up to {greatest} steps of the finest unit")


def matmul(node: Node, inputs: Inputs) -> list[Value]:
    """``a @ b``, of matrices or of stacks of them."""
    a, b = matmul_inputs(node, inputs)
    check_terms(sum_terms(a, b, None))
    return [exact.matmul(a, b)]


def matmul_inputs(node: Node, inputs: Inputs) -> tuple[Dyadic, Dyadic]:
    """The operands of a MatMul: (…, n, k), (…, k, m)."""
    a, b = (real(node, value) for value in inputs)
    if a.m.ndim < 2 or b.m.ndim < 2 or a.shape[-1] != b.shape[-2]:
        node.refuse("shapes that do not fit", found=f"{a.shape} and {b.shape}")
    return a, b


def arithmetic(node: Node, inputs: Inputs) -> list[Value]:
    """Add, Sub and Mul of two float32 or two integer tensors, with broadcasting."""
    a, b = inputs
    if isinstance(a, Dyadic) and isinstance(b, Dyadic):
        if node.op == "Mul":
            return [exact.multiply(a, b)]
        return [exact.add(a, b, 1 if node.op == "Add" else -1)]
    left, right = whole(node, a), whole(node, b)
    wide, other = left.astype(np.int64), right.astype(np.int64)
    y = wide * other if node.op == "Mul" else wide + other if node.op == "Add" else wide - other
    return [within(node, y, left.dtype.name)]


def cast(node: Node, inputs: Inputs) -> list[Value]:
    """Between integers, to float32, and from float32 where the value is whole."""
    (x,) = inputs
    to = CAST_TYPES.get(node.attributes.get("to", 0))
    if to is None:
        node.refuse("a Cast to a type that exact-int8 does not know", found=node.attributes)
    if isinstance(x, np.ndarray):
        values = x.astype(np.int64)
        return [dyadic(values, 0) if to == "float32" else within(node, values, to)]
    value = real(node, x)
    if to == "float32":
        return [value]
    return [within(node, whole_numbers(node, value), to)]


def whole_numbers(node: Node, value: Dyadic) -> np.ndarray:
    """int64 of float32 values that must be whole."""
    odd, e = exact.odd_parts(value.m, value.e)
    if (e[odd != 0] < 0).any():
        node.refuse("a Cast that cuts fractions off", expected="whole numbers", fix="Round first")
    up = np.where(odd == 0, 0, e)
    if up.max(initial=0) > exact.INT64_BITS - exact.FLOAT32_BITS:
        raise InexactError(f"whole numbers of up to 2**{up.max()}")
    whole_values: np.ndarray = odd << up
    return whole_values


def reduced_axes(node: Node, ndim: int, axes: Value | None) -> tuple[int, ...]:
    """Axes of a reduction, from 0; all where none are given."""
    given = () if axes is None else tuple(int(axis) for axis in whole(node, axes))
    if not given and not node.attributes.get("noop_with_empty_axes", 0):
        given = tuple(range(ndim))
    if not all(-ndim <= axis < ndim for axis in given):
        node.refuse("axes that do not fit", expected=f"{-ndim} to {ndim - 1}", found=given)
    return tuple(sorted({axis % ndim for axis in given}))


def reduction(node: Node, inputs: Inputs) -> list[Value]:
    """ReduceSum and ReduceMax."""
    x, given = (*inputs, None)[:2]
    keep = bool(node.attributes.get("keepdims", 1))
    function = np.sum if node.op == "ReduceSum" else np.max
    if isinstance(x, Dyadic):
        axes = reduced_axes(node, x.m.ndim, given)
        value = exact.common(x, axes)
        if node.op == "ReduceSum":
            check_terms(Dyadic(np.abs(value.m).sum(axis=axes), np.asarray(0)))
        e = value.e if value.one_unit or keep else np.squeeze(value.e, axes)
        return [dyadic(function(value.m, axis=axes, keepdims=keep), e)]
    codes = whole(node, x)
    axes = reduced_axes(node, codes.ndim, given)
    y = function(codes.astype(np.int64), axis=axes, keepdims=keep)
    return [within(node, np.asarray(y), codes.dtype.name)]


def maximum(node: Node, inputs: Inputs) -> list[Value]:
    """Max of any number of tensors, with broadcasting."""
    y = inputs[0]
    for other in inputs[1:]:
        y = choose(node, np.maximum, y, other)
    assert y is not None
    return [y]


def choose(node: Node, function: np.ufunc, a: Value | None, b: Value | None) -> Value:
    """The greater or the smaller of two, element by element."""
    if isinstance(a, Dyadic) and isinstance(b, Dyadic):
        left, right, e = exact.aligned(a, b)
        return dyadic(function(left, right), e)
    return np.asarray(function(whole(node, a), whole(node, b)))


def clip(node: Node, inputs: Inputs) -> list[Value]:
    """Clip between two constants, either of which may be left out."""
    y, low, high = (*inputs, None, None)[:3]
    if low is not None:
        y = choose(node, np.maximum, y, low)
    if high is not None:
        y = choose(node, np.minimum, y, high)
    assert y is not None
    return [y]


def relu(node: Node, inputs: Inputs) -> list[Value]:
    """max(x, 0)."""
    x = real(node, inputs[0])
    return [dyadic(np.maximum(x.m, 0), x.e)]


def round_half_even(node: Node, inputs: Inputs) -> list[Value]:
    """Round to whole numbers, half to even."""
    return [exact.round_to_integer(real(node, inputs[0]))]


def square_root(node: Node, inputs: Inputs) -> list[Value]:
    """One correctly rounded float32 square root."""
    x = real(node, inputs[0])
    if x.m.min(initial=0) < 0:
        node.refuse("a square root of a negative number", fix="keep it positive with Max or Add")
    return [exact.from_float(np.sqrt(exact.to_float(x)))]


def quotient(node: Node, inputs: Inputs) -> list[Value]:
    """One correctly rounded float32 division."""
    a, b = (real(node, value) for value in inputs)
    if not b.m.all():
        node.refuse("a division by zero", fix="keep the divisor positive with Max or Add")
    return [exact.from_float(exact.to_float(a) / exact.to_float(b))]


def moved(node: Node, inputs: Inputs) -> list[Value]:
    """What only moves data; units move with their mantissas."""
    data, rest = (inputs, []) if node.op == "Concat" else (inputs[:1], inputs[1:])
    parameters = [None if value is None else whole(node, value) for value in rest]
    if all(isinstance(value, np.ndarray) for value in data):
        return [*move(node, [whole(node, value) for value in data], parameters)]
    values = [real(node, value) for value in data]
    mantissas = move(node, [value.m for value in values], parameters)
    if all(value.one_unit for value in values) and len({int(value.e) for value in values}) == 1:
        return [Dyadic(m, values[0].e) for m in mantissas]
    units = move(node, [np.broadcast_to(value.e, value.shape) for value in values], parameters)
    return [dyadic(m, e) for m, e in zip(mantissas, units, strict=True)]


OPERATIONS: Final[dict[str, Callable[[Node, Inputs], list[Value]]]] = {
    "Add": arithmetic,
    "Cast": cast,
    "Clip": clip,
    "DequantizeLinear": dequantize_linear,
    "Div": quotient,
    "Gemm": gemm,
    "MatMul": matmul,
    "Max": maximum,
    "Mul": arithmetic,
    "QuantizeLinear": quantize_linear,
    "ReduceMax": reduction,
    "ReduceSum": reduction,
    "Relu": relu,
    "Round": round_half_even,
    "Sqrt": square_root,
    "Sub": arithmetic,
    **dict.fromkeys(MOVES, moved),
}


def check_known(node: Node) -> None:
    """Refuse an operation that has no exact meaning here."""
    if node.op not in OPERATIONS:
        node.refuse(
            "an operation that exact-int8 does not know",
            expected="one of " + ", ".join(sorted([*OPERATIONS, "Constant"])),
            found=node.op,
        )


def compute(node: Node, inputs: Inputs) -> list[Value]:
    """Run one node.

    Parameters
    ----------
    node : Node
    inputs : sequence of Value or None
        In the node's order; None for an optional one that is left out.

    Raises
    ------
    InputError
        Naming the node, if float32 could not do this without rounding, or the operation is
        unknown or misused.
    """
    check_known(node)
    try:
        outputs = OPERATIONS[node.op](node, inputs)
        if node.op not in MOVES:  # what is moved was looked at where it was made
            for value in outputs:
                if isinstance(value, Dyadic):
                    exact.check_exact(value)
    except InexactError as error:
        node.refuse(
            "float32 is not exact here",
            expected=f"fewer than {LIMIT} steps of the finest unit",
            found=error,
            fix="use coarser scales, or declare the bundle's numerics as tolerance",
        )
    return outputs
