"""The elementwise part of LSTM and GRU cells; see `engine.backends.integer_graph` for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from engine.backends.compiled.emission import Emitter
from engine.backends.compiled.plan import GruStep, LstmStep


def lstm(e: Emitter, step: LstmStep) -> None:
    """c' and its table; then h'."""
    b, units = e.b, step.units
    names = ("gates_zero", "candidate_zero", "shown_zero", "up_kept", "up_added", "low", "high")
    p = {name: e.parameter(step.parameters, i) for i, name in enumerate(names)}
    for at in range(0, units, e.lanes):
        i, f = (
            b.sub(e.codes(e.arena(step.gates + gate * units + at)), p["gates_zero"])
            for gate in (0, 1)
        )
        g = b.sub(e.codes(e.arena(step.fresh + at)), p["candidate_zero"])
        memory = e.state(step.cell + 4 * at)
        kept = b.shl(b.mul(f, e.load(memory, e.ints(), 4)), p["up_kept"])
        added = b.shl(b.mul(i, g), p["up_added"])
        c = e.clamp(e.rescaled(b.add(kept, added), step.cell_rescale, at), p["low"], p["high"])
        e.store(c, memory, 4)
        e.store_codes(e.requantised(c, step.shown, at, units - at), e.arena(step.scratch + at))
    e.look_up(e.arena(step.scratch), e.arena(step.entries), step.scratch, units)
    for at in range(0, units, e.lanes):
        o = b.sub(e.codes(e.arena(step.gates + 2 * units + at)), p["gates_zero"])
        s = b.sub(e.codes(e.arena(step.scratch + at)), p["shown_zero"])
        h = e.requantised(b.mul(o, s), step.out_rescale, at, units - at)
        e.store_codes(h, e.state(step.hidden + at))


def gru(e: Emitter, step: GruStep) -> None:
    """The candidate and its table; then h' and its codes."""
    b, units = e.b, step.units
    names = ["gates_zero", "candidate_zero", "own_zero", "given_zero", "one", "up_given"]
    names += ["up_reset", "up_added", "up_kept", "low", "high"]
    p = {name: e.parameter(step.parameters, i) for i, name in enumerate(names)}
    for at in range(0, units, e.lanes):
        r = b.sub(e.codes(e.arena(step.gates + at)), p["gates_zero"])
        own = b.sub(e.codes(e.arena(step.own + at)), p["own_zero"])
        given = b.sub(e.codes(e.arena(step.given + at)), p["given_zero"])
        inner = b.add(b.shl(given, p["up_given"]), b.shl(b.mul(r, own), p["up_reset"]))
        codes = e.requantised(inner, step.candidate, at, units - at)
        e.store_codes(codes, e.arena(step.scratch + at))
    e.look_up(e.arena(step.scratch), e.arena(step.entries), step.scratch, units)
    for at in range(0, units, e.lanes):
        z = b.sub(e.codes(e.arena(step.gates + units + at)), p["gates_zero"])
        n = b.sub(e.codes(e.arena(step.scratch + at)), p["candidate_zero"])
        memory = e.state(step.state + 4 * at)
        added = b.shl(b.mul(b.sub(p["one"], z), n), p["up_added"])
        kept = b.shl(b.mul(z, e.load(memory, e.ints(), 4)), p["up_kept"])
        h = e.clamp(e.rescaled(b.add(added, kept), step.state_rescale, at), p["low"], p["high"])
        e.store(h, memory, 4)
        out = e.requantised(h, step.out_rescale, at, units - at)
        e.store_codes(out, e.state(step.hidden + at))


CELLS: Final[dict[type, Callable[[Emitter, Any], None]]] = {LstmStep: lstm, GruStep: gru}
