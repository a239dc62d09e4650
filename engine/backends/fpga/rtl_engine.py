"""A MAC engine with its rows: what its SystemVerilog is written from.

The plan of its steps is in `engine.backends.fpga.rtl_dense`, the text in
`engine.backends.fpga.rtl_mac`, `engine.backends.fpga.rtl_lanes` and
`engine.backends.fpga.rtl_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.backends.fpga.rtl_dense import PRODUCT_BITS, Rows, Sums
from engine.backends.fpga.rtl_library import CODE_BITS
from engine.backends.fpga.rtl_text import signed_bits
from engine.backends.fpga.rtl_value import Value
from engine.backends.integer_graph import CODE_MAX


@dataclass(frozen=True, eq=False)
class Engine:
    """One MAC engine on its way to text.

    Attributes
    ----------
    name : str
        Of the module, and of its output port.
    rows : Rows
        Padded to whole groups.
    sources : tuple of Value
    plan : Sums
    """

    name: str
    rows: Rows
    sources: tuple[Value, ...]
    plan: Sums

    def result(self, name: str) -> Value:
        """The value that it makes, which is called ``name`` in the graph."""
        bits = CODE_BITS if self.plan.codes else self.acc_bits
        return self.plan.result(name, self.name, bits)

    @property
    def acc_bits(self) -> int:
        """Bits of an accumulator."""
        bound = self.rows.bound()
        return signed_bits(-bound, bound)

    @property
    def ports_in(self) -> list[str]:
        """Names of the sources' ports, each once."""
        names: list[str] = []
        for source in self.sources:
            same = sum(name == source.signal for name in names)
            names.append(f"{source.signal}_{len(names)}" if same else source.signal)
        return names

    def weight_steps(self) -> np.ndarray:
        """Weights by step, output lane and input lane: int8 (steps, outputs, inputs)."""
        plan, lanes = self.plan, self.plan.lanes
        parts = []
        for weight, slices in zip(self.rows.weights, plan.slices, strict=True):
            padded = np.pad(weight, ((0, 0), (0, slices * lanes.inputs - weight.shape[1])))
            parts.append(padded.reshape(plan.groups, lanes.outputs, slices, lanes.inputs))
        whole = np.concatenate(parts, axis=2).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(whole.reshape(plan.steps, lanes.outputs, lanes.inputs))

    def tree_bits(self) -> list[int]:
        """Bits of a term at each level of the tree."""
        plan, bound = self.plan, 0
        for weight, slices in zip(self.rows.weights, plan.slices, strict=True):
            edges = np.arange(slices) * plan.lanes.inputs
            sums = np.add.reduceat(np.abs(weight.astype(np.int64)), edges, axis=1)
            bound = max(bound, CODE_MAX * int(sums.max()))
        enough = signed_bits(-bound, bound)
        bits = [max(min(PRODUCT_BITS + level, enough), 2) for level in range(plan.levels + 1)]
        if plan.biased >= 0:
            behind = plan.levels - plan.biased
            bits[plan.biased + 1 :] = [self.acc_bits] * behind
        return bits
