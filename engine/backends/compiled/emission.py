"""The native code of a plan: LLVM for one whole step, through a Numba intrinsic.

Every vector operation is written out, so that each instruction set gets the instructions that it
is there for, and no step depends on what a loop optimiser makes of it. The cells are in
`engine.backends.compiled.cell_emission`.

Source: LLVM Language Reference Manual; Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 2 (VPDPBUSD, VPMADDWD, VPERMI2B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import llvmlite.ir as ir
from numba.core import cgutils

from engine.backends.compiled.plan import (
    MAX_BLOCKS,
    AccumulatorsStep,
    AddStep,
    CodesStep,
    CopyStep,
    Count,
    DelayStep,
    DenseStep,
    Dot,
    LoadStep,
    MaximumStep,
    Place,
    Plan,
    QuantiseStep,
    Rescale,
    ScoresStep,
    TableStep,
)
from engine.backends.integer_graph import CODE_MAX, PRE_CLIP
from engine.trust import CHECK_INPUT
from feeds.cpu import cpu_features

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()
CHAINS: Final = 8  # sums that are under way at once: more than the latency of one product
UNROLLED: Final = 16  # so many turns of a loop over groups are written out
ROUNDING: Final = 12582912.0  # 1.5 * 2**23: adding it rounds to whole numbers, half to even
ROUNDED: Final = 1024.0  # numbers beyond it saturate; within it the sum above is exact
VECTOR_CODES: Final = 16  # codes of a vector in operations on bytes
LOOK_UP_CODES: Final = 64  # codes that VPERMI2B looks up at once


class Emitter:
    """Writes the steps of one plan.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
    plan : Plan
    x, out, arena, state : llvmlite.ir.Value
        Addresses, int64: the input, the output, and both blocks of memory.
    """

    def __init__(self, builder: Any, plan: Plan, x: Any, out: Any, arena: Any, state: Any) -> None:
        self.b = builder
        self.plan = plan
        self.lanes = plan.isa.lanes
        self.x, self.out, self._arena, self._state = (
            builder.inttoptr(address, POINTER) for address in (x, out, arena, state)
        )
        # Numba's stack slots begin at zero.
        self._counts = [cgutils.alloca_once_value(builder, I32(0)) for _ in range(plan.groups)]
        self._wrong = cgutils.alloca_once_value(builder, I64(0))
        self._vbmi = plan.isa.name == "vnni" and "avx512vbmi" in cpu_features()

    # ---- memory

    def at(self, base: Any, offset: Any) -> Any:
        """A pointer so many bytes behind another."""
        if isinstance(offset, int):
            offset = I64(offset)
        return self.b.gep(base, [offset], source_etype=I8)

    def arena(self, offset: Any) -> Any:
        """A pointer into the arena."""
        return self.at(self._arena, offset)

    def state(self, offset: Any) -> Any:
        """A pointer into the stream's state."""
        return self.at(self._state, offset)

    def place(self, place: Place, more: Any = 0) -> Any:
        """A pointer to a place, and ``more`` bytes behind it."""
        base = self._arena if place.region == "arena" else self._state
        if isinstance(more, int):
            return self.at(base, place.offset + more)
        return self.at(self.at(base, place.offset), more)

    def load(self, pointer: Any, kind: Any, align: int = 1) -> Any:
        """A value from memory."""
        return self.b.load(pointer, typ=kind, align=align)

    def store(self, value: Any, pointer: Any, align: int = 1) -> None:
        """A value to memory."""
        self.b.store(value, pointer, align=align)

    def copy(self, target: Any, source: Any, n_bytes: int) -> None:
        """So many bytes from one place to another; they do not overlap."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I64, I1])
        memcpy = cgutils.get_or_insert_function(self.b.module, kind, "llvm.memcpy.p0.p0.i64")
        self.b.call(memcpy, [target, source, I64(n_bytes), I1(0)])

    # ---- vectors

    def ints(self, lanes: int | None = None) -> Any:
        """The type of a vector of int32."""
        return ir.VectorType(I32, self.lanes if lanes is None else lanes)

    def constant(self, kind: Any, value: Any) -> Any:
        """A vector of one constant."""
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, scalar: Any, lanes: int | None = None) -> Any:
        """A vector of one scalar."""
        lanes = self.lanes if lanes is None else lanes
        kind = ir.VectorType(scalar.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def parameter(self, offset: int, index: int, lanes: int | None = None) -> Any:
        """A vector of one int32 of the arena."""
        return self.splat(self.load(self.arena(offset + 4 * index), I32, 4), lanes)

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """Each lane between two others, signed."""
        b = self.b
        value = b.select(b.icmp_signed("<", value, low), low, value)
        return b.select(b.icmp_signed(">", value, high), high, value)

    def codes(self, pointer: Any) -> Any:
        """A vector of codes as int32."""
        kind = ir.VectorType(I8, self.lanes)
        return self.b.zext(self.load(pointer, kind), self.ints())

    def store_codes(self, codes: Any, pointer: Any) -> None:
        """int32 codes as bytes; a whole vector, also where fewer are left."""
        self.store(self.b.trunc(codes, ir.VectorType(I8, codes.type.count)), pointer)

    @contextmanager
    def loop(self, turns: int, stride: int = 1) -> Iterator[Any]:
        """The code inside, ``turns`` times; gives ``turn * stride`` as int64."""
        if turns == 1:
            yield I64(0)
            return
        with cgutils.for_range(self.b, I64(turns), intp=I64) as loop:
            yield self.b.mul(loop.index, I64(stride))

    # ---- rounding and counting

    def rescaled(self, acc: Any, scale: Rescale, at: Any) -> Any:
        """``round_shift`` of accumulators ``at`` elements into a rescale's vectors."""
        b, offset = self.b, self._times(at, 4)
        shift, half, odd = (
            self.load(self.at(self.arena(part), offset), self.ints(), 4)
            for part in (scale.shift, scale.half, scale.odd)
        )
        if scale.left >= 0:
            left = self.load(self.at(self.arena(scale.left), offset), self.ints(), 4)
            low, high = (self.constant(self.ints(), v) for v in (-PRE_CLIP, PRE_CLIP))
            shifted = b.shl(self.clamp(acc, low, high), left)
            acc = b.select(b.icmp_signed(">", left, self.constant(self.ints(), 0)), shifted, acc)
        tie = b.and_(b.ashr(acc, shift), odd)
        return b.ashr(b.add(b.add(acc, half), tie), shift)

    def _times(self, at: Any, size: int) -> Any:
        return at * size if isinstance(at, int) else self.b.mul(at, I64(size))

    def requantised(self, acc: Any, scale: Rescale, at: Any, valid: int) -> Any:
        """Codes of accumulators, as int32; the first ``valid`` of them are counted."""
        zero = self.load(self.at(self.arena(scale.zero), self._times(at, 4)), self.ints(), 4)
        codes = self.b.add(self.rescaled(acc, scale, at), zero)
        low, high = (self.constant(self.ints(), value) for value in (0, CODE_MAX))
        codes = self.clamp(codes, low, high)
        if scale.count is not None:
            self.count(codes, scale.count, valid)
        return codes

    def count(self, codes: Any, count: Count, valid: int) -> None:
        """Add how many of the first ``valid`` codes are saturated."""
        b, lanes = self.b, codes.type.count
        ends = [value for value, on in ((0, count.low), (CODE_MAX, count.high)) if on]
        for end in ends:
            full = b.icmp_unsigned("==", codes, self.constant(codes.type, end))
            mask = b.zext(b.bitcast(full, ir.IntType(lanes)), I64)
            mask = b.and_(mask, I64((1 << min(valid, lanes)) - 1))
            pointer = self._counts[count.group]
            found = b.trunc(b.ctpop(mask), I32)
            b.store(b.add(b.load(pointer), found), pointer)

    # ---- steps

    def mask(self) -> Any:
        """What the value check says after all steps: int64."""
        b = self.b
        mask = b.load(self._wrong) if self.plan.checked else I64(0)
        for i, pointer in enumerate(self._counts):
            row = self.plan.checks + 8 * i
            limit, bits = (self.load(self.arena(row + at), I32, 4) for at in (0, 4))
            over = b.icmp_signed(">", b.load(pointer), limit)
            mask = b.or_(mask, b.zext(b.select(over, bits, I32(0)), I64))
        return mask

    def quantise(self, step: QuantiseStep) -> None:
        """float32 to codes."""
        whole = step.n // self.lanes * self.lanes
        blocks = [(at, self.lanes) for at in range(0, whole, self.lanes)]
        for at, lanes in [*blocks, *((i, 1) for i in range(whole, step.n))]:
            self._quantise_block(step, at, lanes)

    def _quantise_block(self, step: QuantiseStep, at: int, lanes: int) -> None:
        b, kind = self.b, ir.VectorType(F32, lanes)
        x = self.load(self.at(self.x, 4 * at), kind, 4)
        scale, limit = (
            self.splat(self.load(self.arena(offset), F32, 4), lanes)
            for offset in (step.steps_per_unit, step.limit)
        )
        if self.plan.checked:
            above = b.fcmp_ordered(">=", x, b.fneg(limit))
            within = b.and_(above, b.fcmp_ordered("<=", x, limit))
            wrong = b.not_(b.bitcast(within, ir.IntType(lanes)))
            some = b.icmp_unsigned("!=", wrong, ir.IntType(lanes)(0))
            bit = b.select(some, I64(CHECK_INPUT), I64(0))
            b.store(b.or_(b.load(self._wrong), bit), self._wrong)
        steps = b.fmul(x, scale)
        low, high, magic = (self.constant(kind, v) for v in (-ROUNDED, ROUNDED, ROUNDING))
        # A comparison with NaN is false: it gets the lowest code.
        steps = b.select(b.fcmp_ordered(">", steps, low), steps, low)
        steps = b.select(b.fcmp_ordered("<", steps, high), steps, high)
        rounded = b.fptosi(b.fsub(b.fadd(steps, magic), magic), self.ints(lanes))
        codes = b.add(rounded, self.parameter(step.zero, 0, lanes))
        ends = [self.constant(self.ints(lanes), value) for value in (0, CODE_MAX)]
        self.store_codes(self.clamp(codes, *ends), self.arena(step.out + at))

    def load_codes(self, step: LoadStep) -> None:
        """The input is codes."""
        self.copy(self.arena(step.out), self.x, step.n)

    def dense(self, step: DenseStep) -> None:
        """Sums of products, block by block of outputs."""
        blocks = -(-step.outputs // self.lanes)
        with self.loop(step.rows) as row:
            for first in range(0, blocks, MAX_BLOCKS):
                n = min(MAX_BLOCKS, blocks - first)
                sums = self._sums(step, row, first, n)
                for i, acc in enumerate(sums):
                    at = (first + i) * self.lanes
                    self._write(step, acc, row, at)

    def _write(self, step: DenseStep, acc: Any, row: Any, at: int) -> None:
        if step.rescale is None:
            self.store(acc, self.arena(step.out + 4 * at), 4)
            return
        codes = self.requantised(acc, step.rescale, at, step.outputs - at)
        offset = self.b.mul(row, I64(step.outputs))
        self.store_codes(codes, self.at(self.arena(step.out + at), offset))

    def _sums(self, step: DenseStep, row: Any, first: int, n: int) -> list[Any]:
        """Accumulators of ``n`` blocks."""
        b = self.b
        total: list[Any] = []
        for i, dot in enumerate(step.dots):
            if i == 0 or step.up:
                start = [
                    self.load(self.arena(step.bias[i] + 4 * (first + k) * self.lanes), self.ints())
                    for k in range(n)
                ]
            else:
                start = total
            blocks = -(-step.outputs // self.lanes)
            found = self._accumulate(dot, row, blocks, first, start)
            if step.up:
                ups = [
                    self.load(self.arena(step.up[i] + 4 * (first + k) * self.lanes), self.ints())
                    for k in range(n)
                ]
                found = [b.shl(acc, up) for acc, up in zip(found, ups, strict=True)]
                if total:
                    found = [b.add(a, c) for a, c in zip(found, total, strict=True)]
            total = found
        return total

    def _accumulate(
        self, dot: Dot, row: Any, blocks: int, first: int, start: list[Any]
    ) -> list[Any]:
        """Add one product to the accumulators of some blocks."""
        b, n, isa = self.b, len(start), self.plan.isa
        vector = isa.lanes * isa.group
        weights = self.arena(dot.weight + first * dot.groups * vector)
        source = self.place(dot.source, b.mul(row, I64(dot.row_bytes)))
        ways = max(1, min(CHAINS // n, dot.groups))
        zero = self.constant(self.ints(), 0)
        sums = [list(start), *([zero] * n for _ in range(ways - 1))]

        def turn(sums: list[list[Any]], group: Any, ways: int) -> list[list[Any]]:
            """Products of so many groups, from one on."""
            sums = [list(part) for part in sums]
            for way in range(ways):
                inputs = self.at(self.at(source, self._times(group, isa.group)), way * isa.group)
                spread = self._spread(inputs)
                begin = self.at(weights, self._times(group, vector * n))
                for k in range(n):
                    weight = self.at(begin, (way * n + k) * vector)
                    sums[way][k] = self._dot(sums[way][k], spread, weight)
            return sums

        turns, rest = divmod(dot.groups, ways)
        if turns <= UNROLLED:
            for i in range(turns):
                sums = turn(sums, i * ways, ways)
        else:
            sums = self._accumulating_loop(
                sums, turns, lambda s, i: turn(s, self._times(i, ways), ways)
            )
        sums = turn(sums, turns * ways, rest)
        total = sums[0]
        for part in sums[1:]:
            total = [b.add(acc, other) for acc, other in zip(total, part, strict=True)]
        return total

    def _accumulating_loop(
        self, sums: list[list[Any]], turns: int, body: Callable[[list[list[Any]], Any], Any]
    ) -> list[list[Any]]:
        """A loop that carries accumulators in registers."""
        b = self.b
        before, inside, behind = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(inside)
        b.position_at_end(inside)
        index = b.phi(I64)
        carried = [[b.phi(acc.type) for acc in part] for part in sums]
        index.add_incoming(I64(0), before)
        for phis, part in zip(carried, sums, strict=True):
            for phi, acc in zip(phis, part, strict=True):
                phi.add_incoming(acc, before)
        found = body([list(part) for part in carried], index)
        after = b.add(index, I64(1))
        index.add_incoming(after, b.block)
        for phis, part in zip(carried, found, strict=True):
            for phi, acc in zip(phis, part, strict=True):
                phi.add_incoming(acc, b.block)
        b.cbranch(b.icmp_unsigned("<", after, I64(turns)), inside, behind)
        b.position_at_end(behind)
        return found

    def _spread(self, inputs: Any) -> Any:
        """A group of inputs in every lane, as `_dot` takes it."""
        b, isa = self.b, self.plan.isa
        if isa.group == 4:
            return self.splat(self.load(inputs, I32))
        if isa.group == 2:
            pair = b.zext(self.load(inputs, I16), I32)
            high = b.shl(b.and_(pair, I32(0xFF00)), I32(8))
            spread = self.splat(b.or_(b.and_(pair, I32(0xFF)), high))
            return b.bitcast(spread, ir.VectorType(I16, 2 * self.lanes))
        return self.splat(b.zext(self.load(inputs, I8), I32))

    def _dot(self, acc: Any, inputs: Any, weight: Any) -> Any:
        """Products of a group in each lane, added to accumulators."""
        b, isa, kind = self.b, self.plan.isa, self.ints()
        if isa.group == 4:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
            signature = ir.FunctionType(kind, [kind, kind, kind])
            product = cgutils.get_or_insert_function(b.module, signature, name)
            return b.call(product, [acc, inputs, self.load(weight, kind, 32)])
        narrow = self.load(weight, ir.VectorType(I8, self.lanes * isa.group), 8)
        if isa.group == 2:
            half = ir.VectorType(I16, 2 * self.lanes)
            signature = ir.FunctionType(kind, [half, half])
            name = "llvm.x86.avx2.pmadd.wd"
            product = cgutils.get_or_insert_function(b.module, signature, name)
            return b.add(acc, b.call(product, [inputs, b.sext(narrow, half)]))
        return b.add(acc, b.mul(inputs, b.sext(narrow, kind)))

    def delay(self, step: DelayStep) -> None:
        """The lags of a ring, and the present in place of the oldest."""
        b, size = self.b, step.rows * step.row_bytes
        position = self.load(self.state(step.position), I32, 4)
        for i, lag in enumerate(step.lags):
            source = self.place(step.source)
            if lag:
                slot = b.sub(position, I32(lag))
                wrapped = b.add(slot, I32(step.steps))
                slot = b.select(b.icmp_signed("<", slot, I32(0)), wrapped, slot)
                source = self._slot(step, slot)
            if step.by_row and step.rows > 1:
                for row in range(step.rows):
                    target = step.out + (row * len(step.lags) + i) * step.row_bytes
                    from_row = self.at(source, row * step.row_bytes)
                    self.copy(self.arena(target), from_row, step.row_bytes)
            else:
                self.copy(self.arena(step.out + i * size), source, size)
        self.copy(self._slot(step, position), self.place(step.source), size)
        following = b.add(position, I32(1))
        wraps = b.icmp_signed("==", following, I32(step.steps))
        self.store(b.select(wraps, I32(0), following), self.state(step.position), 4)

    def _slot(self, step: DelayStep, slot: Any) -> Any:
        offset = self.b.mul(self.b.zext(slot, I64), I64(step.rows * step.row_bytes))
        return self.at(self.state(step.ring), offset)

    def add(self, step: AddStep) -> None:
        """Two values in their finer unit."""
        b = self.b
        for at in range(0, step.n, self.lanes):
            parts = []
            for i, source in enumerate((step.a, step.b)):
                zero, up = (self.parameter(step.parameters, 2 * i + k) for k in (0, 1))
                parts.append(b.shl(b.sub(self.codes(self.place(source, at)), zero), up))
            acc = b.add(parts[0], parts[1])
            codes = self.requantised(acc, step.rescale, at, step.n - at)
            self.store_codes(codes, self.arena(step.out + at))

    def table(self, step: TableStep) -> None:
        """Each code looked up; then counted, where the value check does."""
        self.look_up(self.place(step.source), self.arena(step.entries), step.out, step.n)
        if step.count is None:
            return
        kind = ir.VectorType(I8, VECTOR_CODES)
        for at in range(0, step.n, VECTOR_CODES):
            codes = self.b.zext(self.load(self.arena(step.out + at), kind), self.ints(VECTOR_CODES))
            self.count(codes, step.count, step.n - at)

    def look_up(self, source: Any, entries: Any, out: int, n: int) -> None:
        """``n`` codes through a table into the arena; ``out`` may be where they are."""
        if self._vbmi:
            tables = [
                self.load(self.at(entries, LOOK_UP_CODES * i), ir.VectorType(I8, LOOK_UP_CODES))
                for i in range(4)
            ]
            for at in range(0, n, LOOK_UP_CODES):
                self._look_up_vector(self.at(source, at), tables, self.arena(out + at))
            return
        b = self.b
        with self.loop(n) as i:
            code = b.zext(self.load(self.at(source, i), I8), I64)
            self.store(self.load(self.at(entries, code), I8), self.at(self.arena(out), i))

    def _look_up_vector(self, source: Any, tables: list[Any], out: Any) -> None:
        """Both halves of a table, and of both what the highest bit of a code says."""
        b, kind = self.b, ir.VectorType(I8, LOOK_UP_CODES)
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        signature = ir.FunctionType(kind, [kind, kind, kind])
        permute = cgutils.get_or_insert_function(b.module, signature, name)
        codes = self.load(source, kind)
        low, high = (b.call(permute, [tables[i], codes, tables[i + 1]]) for i in (0, 2))
        upper = b.icmp_signed("<", codes, self.constant(kind, 0))
        self.store(b.select(upper, high, low), out)

    def maximum(self, step: MaximumStep) -> None:
        """Greatest of rows."""
        b, kind = self.b, ir.VectorType(I8, VECTOR_CODES)
        for at in range(0, step.row_bytes, VECTOR_CODES):
            best = self.load(self.place(step.source, at), kind)
            for row in range(1, step.rows):
                other = self.load(self.place(step.source, row * step.row_bytes + at), kind)
                best = b.select(b.icmp_unsigned(">", other, best), other, best)
            self.store(best, self.arena(step.out + at))

    def copy_rows(self, step: CopyStep) -> None:
        """Bytes of rows."""
        for row in range(step.rows):
            source = self.place(step.source, row * step.source_stride)
            self.copy(self.arena(step.out + row * step.out_stride), source, step.row_bytes)

    def scores(self, step: ScoresStep) -> None:
        """Accumulators times their scales."""
        b = self.b
        with self.loop(step.n, 4) as offset:
            acc = self.load(self.at(self.arena(step.acc), offset), I32, 4)
            scale = self.load(self.at(self.arena(step.scale), offset), F32, 4)
            self.store(b.fmul(b.sitofp(acc, F32), scale), self.at(self.out, offset), 4)

    def accumulators(self, step: AccumulatorsStep) -> None:
        """Accumulators as they are."""
        self.copy(self.out, self.arena(step.acc), 4 * step.n)

    def codes_out(self, step: CodesStep) -> None:
        """Codes as int32."""
        with self.loop(step.n) as i:
            code = self.b.zext(self.load(self.at(self.place(step.source), i), I8), I32)
            self.store(code, self.at(self.out, self.b.mul(i, I64(4))), 4)


def emit(builder: Any, plan: Plan, x: Any, out: Any, arena: Any, state: Any) -> Any:
    """Write a whole step; returns the mask of the value check, int64."""
    from engine.backends.compiled.cell_emission import CELLS

    emitter = Emitter(builder, plan, x, out, arena, state)
    kinds: dict[type, Callable[[Any], None]] = {
        QuantiseStep: emitter.quantise,
        LoadStep: emitter.load_codes,
        DenseStep: emitter.dense,
        DelayStep: emitter.delay,
        AddStep: emitter.add,
        TableStep: emitter.table,
        MaximumStep: emitter.maximum,
        CopyStep: emitter.copy_rows,
        ScoresStep: emitter.scores,
        AccumulatorsStep: emitter.accumulators,
        CodesStep: emitter.codes_out,
    }
    for step in plan.steps:
        write = kinds.get(type(step))
        if write is not None:
            write(step)
        else:
            CELLS[type(step)](emitter, step)
    return emitter.mask()
