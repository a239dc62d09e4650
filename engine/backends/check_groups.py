"""The value check of an INT8 graph as data: which codes are counted together, and up to how many.

The graph of a bundle carries its value check as ONNX nodes (written by `models.value_checks`):
flags of saturated codes, a product that counts them group by group, a table of what each count
means. A backend that does not run ONNX needs the groups themselves; here they are read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from engine.backends.integer_graph import CODE_MAX, CheckGroup
from engine.manifest import CHECK_PREFIX, VIOLATIONS
from engine.trust import CHECK_INPUT
from feeds.errors import InputError

if TYPE_CHECKING:
    import onnx

INPUT_STEPS: Final = 126  # of the input check's own scale, either way
INPUT_ZERO_POINT: Final = 127
LOW_FLAG: Final = (-1.0, 1)  # scale and zero point that leave the code 0 above 0, and no other
HIGH_FLAG: Final = (1.0, CODE_MAX - 1)  # the code 255
INPUT_FLAG: Final = (1.0, CODE_MAX - 2)  # the codes 254 and 255: beyond `INPUT_STEPS`


@dataclass(frozen=True)
class Counted:
    """A uint8 tensor whose saturated codes are counted."""

    group: int
    low: bool
    high: bool


@dataclass(frozen=True)
class _Part:
    """Flags of one tensor of codes, counted in one column; ``own`` where only the check has it."""

    codes: str
    column: int
    flag: tuple[float, int]
    own: bool


@dataclass(frozen=True)
class ValueCheck:
    """What a graph checks.

    Attributes
    ----------
    groups : tuple of CheckGroup
    counted : dict of str to Counted
        By tensor.
    input_limit : float
        Greatest magnitude of an input that is no violation.
    """

    groups: tuple[CheckGroup, ...]
    counted: dict[str, Counted]
    input_limit: float


NO_CHECK: Final = ValueCheck((), {}, math.inf)


def read_value_check(
    model: onnx.ModelProto, sizes: Mapping[str, int], where: str = "ONNX model"
) -> ValueCheck:
    """The groups of a graph's value check.

    Parameters
    ----------
    model : onnx.ModelProto
        With its check nodes.
    sizes : mapping of str to int
        Elements of each tensor of the model itself.
    where : str
        The model's name, for errors.

    Raises
    ------
    InputError
        If the check is none that counts saturated codes.
    """
    if not model.graph.output or model.graph.output[-1].name != VIOLATIONS:
        return NO_CHECK
    return _Reader(model, sizes, where).read()


class _Reader:
    """Walks back from the mask to the codes."""

    def __init__(self, model: onnx.ModelProto, sizes: Mapping[str, int], where: str) -> None:
        import onnx

        self._where = where
        self._sizes = sizes
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._constants = {
            item.name: onnx.numpy_helper.to_array(item)
            for item in model.graph.initializer
            if item.name.startswith(CHECK_PREFIX)
        }

    def read(self) -> ValueCheck:
        """The whole check."""
        meant = self._maker(self._maker(VIOLATIONS, "ReduceSum").input[0], "Gather")
        table = self._constant(meant.input[0]).view(np.uint32)
        counts = self._maker(meant.input[1], "MatMulInteger")
        weights = self._constant(counts.input[1]).astype(np.int64)
        whole = self._maker(self._maker(counts.input[0], "QuantizeLinear").input[0], "Concat")
        *named, last = whole.input
        units = self._constant(self._maker(last, "DequantizeLinear").input[0]).astype(np.int64)
        offsets = units.reshape(-1) @ weights[len(weights) - units.size :]
        parts, begin = [], 0
        for name in named:
            part, size = self._part(name, weights[begin:])
            parts.append(part)
            begin += size
        if begin + units.size != len(weights):
            self._refuse(counts.name, f"{begin + units.size} rows of weights")
        ends = sorted([*offsets.tolist(), len(table)])
        meanings = [table[at : ends[ends.index(at) + 1]] for at in offsets.tolist()]
        limit = self._input_limit([part for part in parts if part.own], meanings)
        groups: dict[int, CheckGroup] = {}
        counted: dict[str, Counted] = {}
        for part in parts:
            if part.own:
                continue
            groups.setdefault(part.column, self._group(meanings[part.column]))
            group = list(groups).index(part.column)
            low, high = part.flag == LOW_FLAG, part.flag == HIGH_FLAG
            before = counted.get(part.codes, Counted(group, False, False))
            if low == high or before.group != group or low & before.low or high & before.high:
                self._refuse(part.codes, "flags of the codes 0 and 255, each counted once")
            counted[part.codes] = Counted(group, before.low or low, before.high or high)
        return ValueCheck(tuple(groups.values()), counted, limit)

    def _group(self, meanings: np.ndarray) -> CheckGroup:
        """A table that is 0 up to its limit and one mask behind it."""
        wrong = np.flatnonzero(meanings)
        limit = int(wrong[0]) - 1 if len(wrong) else len(meanings) - 1
        mask = int(meanings[limit + 1]) if len(wrong) else 0
        if limit < 0 or (meanings[limit + 1 :] != mask).any():
            self._refuse(CHECK_PREFIX + "table", "0 up to a limit, and one mask behind it")
        return CheckGroup(mask, limit)

    def _part(self, name: str, weights: np.ndarray) -> tuple[_Part, int]:
        """What the next rows of weights count, and how many they are."""
        real = self._maker(name, "DequantizeLinear")
        scale, zero = (self._constant(item).item() for item in real.input[1:])
        codes = real.input[0]
        maker = self._makers.get(codes)
        if maker is not None and maker.op_type == "Reshape" and codes.startswith(CHECK_PREFIX):
            codes = maker.input[0]
        own = codes not in self._sizes
        size = self._sizes.get(self._maker(codes, "QuantizeLinear").input[0] if own else codes)
        if size is None:
            self._refuse(codes, "codes of a tensor of the model")
        rows = weights[:size]
        columns = np.flatnonzero(rows.any(axis=0))
        if len(columns) != 1 or not (rows[:, columns[0]] == 1).all():
            self._refuse(codes, "codes that are counted once")
        return _Part(codes, int(columns[0]), (scale, zero), own), size

    def _input_limit(self, parts: list[_Part], meanings: list[np.ndarray]) -> float:
        """Greatest float32 that the input check's scale puts within `INPUT_STEPS`."""
        if not parts:
            return math.inf
        codes, column = parts[0].codes, parts[0].column
        group = self._group(meanings[column])
        found = sorted((part.codes, part.column, part.flag) for part in parts)
        if found != [(codes, column, LOW_FLAG), (codes, column, INPUT_FLAG)]:
            self._refuse(codes, "flags of the input's codes 0, 254 and 255")
        if (group.mask, group.limit) != (CHECK_INPUT, 0):
            self._refuse(codes, f"{CHECK_INPUT} where one is flagged")
        quantise = self._maker(codes, "QuantizeLinear")
        if self._constant(quantise.input[2]).item() != INPUT_ZERO_POINT:
            self._refuse(codes, f"zero point {INPUT_ZERO_POINT}")
        step = np.float32(self._constant(quantise.input[1]).item())
        limit = np.float32(step * np.float32(INPUT_STEPS + 0.5))
        up, down = np.float32(np.inf), np.float32(0.0)
        while np.rint(limit / step) <= INPUT_STEPS:
            limit = np.nextafter(limit, up)
        while np.rint(limit / step) > INPUT_STEPS:
            limit = np.nextafter(limit, down)
        return float(limit)

    def _maker(self, name: str, op: str) -> onnx.NodeProto:
        node = self._makers.get(name)
        if node is None or node.op_type != op:
            self._refuse(name, op, "none" if node is None else node.op_type)
        return node

    def _constant(self, name: str) -> np.ndarray:
        found = self._constants.get(name)
        if found is None:
            self._refuse(name, "a constant")
        return found

    def _refuse(self, name: str, expected: str, found: str = "") -> NoReturn:
        raise InputError(
            "a value check that is not known here",
            where=f"{self._where}: {name}",
            expected=expected,
            found=found,
            fix="rebuild the bundle with this version",
        )


def input_mask(x: np.ndarray, limit: float) -> int:
    """`CHECK_INPUT` where any input is beyond the limit, or no number; else 0."""
    return 0 if math.isinf(limit) or bool((np.abs(x) <= limit).all()) else CHECK_INPUT
