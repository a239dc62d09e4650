"""The graph's layers as modules: which there are, their wires, and when their values come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.backends.fpga import rtl_elementwise as elementwise
from engine.backends.fpga.rtl_cells import (
    cell_lanes,
    gru_cell,
    gru_rows,
    gru_sources,
    lstm_cell,
    lstm_rows,
)
from engine.backends.fpga.rtl_checks import verdict
from engine.backends.fpga.rtl_dense import Rows, Shape, Sums, plan_sums, rows_of, takes_beats
from engine.backends.fpga.rtl_engine import Engine
from engine.backends.fpga.rtl_library import CODE_BITS, LOOKAHEAD
from engine.backends.fpga.rtl_mac import engine_files
from engine.backends.fpga.rtl_pipeline import SUMS, Cell
from engine.backends.fpga.rtl_text import constant, packed
from engine.backends.fpga.rtl_value import Lanes, Parallelism, Value
from engine.backends.fpga.rtl_wiring import Part, Wiring
from engine.backends.integer_graph import (
    INPUT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    Layer,
    LstmCell,
    Maximum,
    Point,
    Table,
    denses,
    requantise,
)
from engine.manifest import StateTensor
from feeds.errors import InputError


class Circuit(Wiring):
    """A graph on its way to a design.

    Parameters
    ----------
    graph : IntegerGraph
    parallelism : Parallelism
    draft : bool
        Whether only the plan is asked for: which lanes there are, and when values come.

    Attributes
    ----------
    plans : dict of str to Sums
        Of the MAC engines, by layer; a cell's by the cell.
    settled : int
        Cycle from which all state is that of the next inference.
    x, result : Value
        Both ends.
    checks : list of str
        The value check, for the top module.
    due : int
        Cycles from the input's handshake to the answer.
    """

    def __init__(
        self, graph: IntegerGraph, parallelism: Parallelism, *, draft: bool = False
    ) -> None:
        super().__init__(draft)
        self.graph, self._parallelism = graph, parallelism
        self.plans: dict[str, Sums] = {}
        self._engines: list[Engine] = []
        self.settled = 0
        self.x = Value(INPUT, self.unique(INPUT), graph.n_features, CODE_BITS, graph.n_features, 0)
        self._keep(INPUT, self.x)
        for layer in graph.layers:
            self._layer(layer)
        self.result = self._whole(graph.layers[-1].name)
        self.checks, checked = verdict(self.counts, graph.checks)
        self.due = max(self.result.ahead + LOOKAHEAD, checked, self.settled)

    def files(self) -> dict[str, str]:
        """SystemVerilog of all modules but the top one, by file name."""
        found = dict(self._files)
        for engine in self._engines:
            found |= engine_files(engine)
        return found

    def _layer(self, layer: Layer) -> None:
        rows = getattr(layer, "rows", 1)
        if isinstance(layer, Maximum) or rows > 1:
            raise InputError(
                "a layer over several rows, which the generated circuit has no place for",
                where=f"{self.graph.where}: {layer.name}",
                expected="one row of codes",
                found=f"{type(layer).__name__} of {rows} rows",
                fix="serve this bundle with another backend",
            )
        if isinstance(layer, Dense):
            self._dense(layer)
        elif isinstance(layer, Delay):
            self._delay(layer)
        elif isinstance(layer, Add):
            self._add(layer)
        elif isinstance(layer, Table):
            self._table(layer)
        elif isinstance(layer, Columns):
            source = self._whole(layer.source)
            chosen = [(source, n) for n in range(layer.start, layer.stop)]
            self._keep(layer.name, self._wired(layer.name, chosen))
        elif isinstance(layer, Concat):
            values = [self._whole(name) for name in layer.sources]
            chosen = [(value, n) for value in values for n in range(value.size)]
            self._keep(layer.name, self._wired(layer.name, chosen))
        elif isinstance(layer, LstmCell):
            self._lstm(layer)
        else:
            self._gru(layer)

    def _engine(
        self,
        layer: str,
        name: str,
        shape: Shape,
        sources: tuple[str, ...],
        lanes: Lanes,
        rows: Callable[[], Rows],
    ) -> Value:
        """A MAC engine over values of the graph; what is there first is taken first."""
        parts = [(at, part) for at, source in enumerate(sources) for part in self._parts[source]]
        parts.sort(key=lambda entry: entry[1].value.ahead)
        values = [self._collect(part.value) for _, part in parts[:-1]]
        last = parts[-1][1].value
        plan = None
        if takes_beats(last, shape.rows, lanes):
            plan = plan_sums(shape, [*values, last], lanes)
        if plan is None:
            last = self._collect(last)
            plan = plan_sums(shape, [*values, last], lanes)
        assert plan is not None
        values.append(last)
        signal = self.unique(name)
        self.plans[layer] = plan
        if self.draft:
            return plan.result(name, signal, CODE_BITS)
        given = rows()
        ordered = replace(
            given,
            weights=tuple(given.weights[at][:, part.columns] for at, part in parts),
            ups=tuple(given.ups[at] for at, _ in parts),
        )
        padded = ordered.padded(plan.groups * plan.lanes.outputs)
        engine = Engine(signal, padded, tuple(values), plan)
        self._engines.append(engine)
        value = engine.result(name)
        self._declare(value)
        ports = {"rst": "rst"}
        for port, source in zip(engine.ports_in, values, strict=True):
            ports |= {f"{port}_ahead": f"{source.signal}_ahead", port: source.signal}
        ports |= {f"{signal}_ahead": f"{signal}_ahead", signal: signal}
        self._instance(signal, ports, HOLD="HOLD")
        return value

    def _dense(self, layer: Dense) -> None:
        sources = tuple(product.source for product in layer.products)
        lanes = self._parallelism.of(layer.name)
        shape = Shape(layer.outputs, _aligned(layer), layer.point is not None)
        value = self._engine(layer.name, layer.name, shape, sources, lanes, lambda: rows_of(layer))
        self._count(layer.point, value)
        self._keep(layer.name, value)

    def _delay(self, layer: Delay) -> None:
        source = self._single(layer.source)
        size = source.size
        past = elementwise.past_lags(layer)
        parts = [
            Part(source, place * size + np.arange(size))
            for place, lag in enumerate(layer.lags)
            if lag == 0
        ]
        if past:
            name = self.unique(layer.name)
            whole = self._collect(source)
            value = elementwise.past_value(layer, name, size)
            self._declare(value)
            if not self.draft:
                self._files[f"{name}.sv"] = elementwise.delay_module(layer, name, whole)
            ports = {"rst": "rst", "start": "start", "fresh": "fresh"}
            for port in (f"{whole.signal}_ahead", whole.signal, f"{name}_ahead", name):
                ports[port] = port
            self._instance(name, ports)
            columns = np.concatenate([place * size + np.arange(size) for _, place in past])
            parts.append(Part(value, columns))
            self.settled = max(self.settled, elementwise.delay_settled(layer, whole))
        self._parts[layer.name] = tuple(parts)

    def _add(self, layer: Add) -> None:
        a, b = self._whole(layer.a), self._whole(layer.b)
        latest = max((a, b), key=lambda value: value.ahead)
        name = self.unique(layer.name)
        ahead = latest.ahead + elementwise.ADD_CYCLES
        value = Value(layer.name, name, a.size, CODE_BITS, a.size, ahead)
        self._declare(value)
        if not self.draft:
            self._files[f"{name}.sv"] = elementwise.add_module(layer, name, a.size)
        ports = {"rst": "rst", "ahead": f"{latest.signal}_ahead", "a": a.signal, "b": b.signal}
        ports |= {f"{name}_ahead": f"{name}_ahead", name: name}
        self._instance(name, ports, HOLD="HOLD")
        self._count(layer.point, value)
        self._keep(layer.name, value)

    def _table(self, layer: Table) -> None:
        source = self._single(layer.source)
        if source.size % source.beat:
            source = self._collect(source)
        if source.whole:
            source = self._serialise(source, self._parallelism.of(layer.name).outputs)
        name = self.unique(layer.name)
        value = replace(
            source, name=layer.name, signal=name, ahead=source.ahead + elementwise.TABLE_CYCLES
        )
        self._declare(value)
        if not self.draft:
            self._files |= elementwise.table_files(name, layer.entries, source)
        ports = {"rst": "rst"}
        for port in (f"{source.signal}_ahead", source.signal, f"{name}_ahead", name):
            ports[port] = port
        self._instance(name, ports, HOLD="HOLD")
        self._count(layer.point, value)
        self._keep(layer.name, value)

    def _state(self, tensor: StateTensor, size: int) -> Value:
        """The codes that a cell's last inference left; `_cell` wires where they come from."""
        value = Value(tensor.input, self.unique(tensor.input), size, CODE_BITS, size, 0)
        self._declare(value)
        self.body.append(f"  assign {value.signal}_ahead = accept;")
        self._keep(tensor.input, value)
        return value

    def _lstm(self, layer: LstmCell) -> None:
        hidden = self._state(layer.hidden, layer.units)
        sources = tuple(product.source for product in layer.sums.products)
        lanes = cell_lanes(self._parallelism.of(layer.name), layer.units)
        shape = Shape(SUMS * layer.units, _aligned(layer.sums), codes=True)
        sums = self._engine(
            layer.name, layer.sums.name, shape, sources, lanes, lambda: lstm_rows(layer)
        )
        self._count_sums(layer.gates_in, sums, (0, 1, 2))
        self._count_sums(layer.candidate_in, sums, (3,))
        name, inner = self.unique(layer.name), self.unique(layer.shown_in.name)
        made = lstm_cell(layer, name, inner, sums, draft=self.draft)
        self._cell(layer, made, sums, hidden, int(layer.hidden.initial))

    def _gru(self, layer: GruCell) -> None:
        hidden = self._state(layer.hidden, layer.units)
        lanes = cell_lanes(self._parallelism.of(layer.name), layer.units)
        align = any(_aligned(dense) for dense in denses(layer))
        shape = Shape(SUMS * layer.units, align, codes=True)
        sums = self._engine(
            layer.name,
            f"{layer.name}.sums",
            shape,
            gru_sources(layer),
            lanes,
            lambda: gru_rows(layer),
        )
        for dense, gates in ((layer.gates, (0, 1)), (layer.new_x, (2,)), (layer.new_h, (3,))):
            self._count_sums(dense.point, sums, gates)
        name, inner = self.unique(layer.name), self.unique(layer.candidate_in.name)
        made = gru_cell(layer, name, inner, sums, draft=self.draft)
        start = np.array([layer.hidden.initial], dtype=np.int64)
        initial = int(requantise(start, layer.out_shift, layer.out.zero_point)[0])
        self._cell(layer, made, sums, hidden, initial)

    def _count_sums(self, point: Point | None, sums: Value, gates: tuple[int, ...]) -> None:
        """Count the codes of some of each unit's sums."""
        if point is None or point.group < 0:
            return
        units = sums.beat // SUMS
        beat = units * len(gates)
        value = replace(
            sums, name=point.name, signal=self.unique(point.name), size=sums.beats * beat, beat=beat
        )
        self._declare(value)
        at = [SUMS * unit + gate for unit in range(units) for gate in gates]
        chosen = [f"{sums.signal}[{CODE_BITS * n} +: {CODE_BITS}]" for n in reversed(at)]
        self.body += [
            f"  assign {value.signal}_ahead = {sums.signal}_ahead;",
            f"  assign {value.signal} = {{{', '.join(chosen)}}};",
        ]
        self._count(point, value)

    def _cell(
        self, layer: LstmCell | GruCell, made: Cell, sums: Value, hidden: Value, initial: int
    ) -> None:
        """A cell's module behind its sums, its codes counted and kept for the next inference."""
        self._files |= made.files
        self._declare(made.out)
        self._declare(made.inner)
        ports = {"rst": "rst", "fresh": "fresh"}
        for value in (sums, made.inner, made.out):
            ports |= {f"{value.signal}_ahead": f"{value.signal}_ahead", value.signal: value.signal}
        self._instance(made.out.signal, ports, HOLD="HOLD")
        self._count(made.inner_point, made.inner)
        self._count(layer.out, made.out)
        self._keep(layer.name, made.out)
        whole = self._collect(made.out, always=True)
        initials = constant(hidden.width, packed(CODE_BITS, [initial] * hidden.size))
        self._instance(
            "state_register",
            {"start": "start", "fresh": "fresh", "next": whole.signal, "now": hidden.signal},
            f"u_{hidden.signal}",
            BITS=hidden.width,
            INITIAL=initials,
        )
        self.settled = max(self.settled, made.settled, whole.ahead + LOOKAHEAD)


def _aligned(layer: Dense) -> bool:
    """Whether a layer's products have units of their own."""
    return any(product.up.any() for product in layer.products)
