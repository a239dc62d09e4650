"""Place and route: how far it is, by the tool's own log, and what becomes of it where it stalls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.backends.fpga import synthesis
from engine.backends.fpga.synthesis import STALLED_AFTER_S, RouteProgress, place_and_route
from engine.backends.fpga.toolchain import Tool


def test_progress_never_falls_and_follows_the_log() -> None:
    following = RouteProgress()
    log = [
        "Info: Packing constants..",
        "Info:     at iteration #3, type ALL: wirelen solved = 1, spread = 2, legal = 3; time = 1s",
        "Info:   at iteration #10: temp = 0.000000, timing cost = 5, wirelen = 4",
        "Info:       1000 |      300        200 |  300   200 |      4000|       0.1       0.1|",
        "Info:     at iteration #1, type ALL: wirelen solved = 1, spread = 2, legal = 3; time = 1s",
        "Info:       5000 |      300        200 |  300   200 |         0|       0.1       0.5|",
    ]
    shares = [following.share(line) for line in log]
    assert shares == sorted(shares)
    assert shares[0] == 0.0 < shares[1] < shares[2] < shares[3]
    assert shares[-1] == 1.0


def test_progress_follows_the_other_routers_log_too() -> None:
    following = RouteProgress()
    log = [
        "Info:   at iteration #10: temp = 0.000000, timing cost = 5, wirelen = 4",
        "Info:     iter=1 wires=533326 overused=30751 overuse=37594 archfail=NA",
        "Info:     iter=2 wires=544584 overused=942 overuse=1626 archfail=NA",
        "Info:     iter=3 wires=556244 overused=0 overuse=0 archfail=0",
    ]
    shares = [following.share(line) for line in log]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0


def test_a_route_that_gets_no_further_is_noticed() -> None:
    def row(left: int) -> str:
        return f"Info:       1000 |      300        200 |  300   200 |      {left}|       0.1  0.1|"

    following = RouteProgress()
    assert not following.stalled(2 * STALLED_AFTER_S), "it does not route yet"
    following.share(row(500))
    assert not following.stalled(2 * STALLED_AFTER_S)
    assert not following.stalled(3 * STALLED_AFTER_S - 1)
    following.share(row(499))
    assert not following.stalled(3 * STALLED_AFTER_S), "fewer than before"
    following.share(row(502))
    assert not following.stalled(4 * STALLED_AFTER_S)
    assert following.stalled(4 * STALLED_AFTER_S + 1)


def test_where_a_router_gets_no_further_the_other_one_begins_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for nextpnr: router1 says what it has left and then searches on and on."""
    program = tmp_path / "nextpnr"
    program.write_text(
        f"""#!{sys.executable}
import sys
given = dict(zip(sys.argv, sys.argv[1:]))
print("Info:  1000 |  300  200 |  300  200 |  77|  0.1  0.1|", flush=True)
while given["--router"] == "router1" and given["--seed"] == "2":
    pass
open(given["--report"], "w").write('{{"router": "' + given["--router"] + '"}}')
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(synthesis, "STALLED_AFTER_S", 0.5)
    said: list[str] = []
    tool = Tool("nextpnr-ecp5", program, "0")
    found = place_and_route(tmp_path, tool, 8, [1, 2], 2, lambda share: None, said.append)
    assert [(one.seed, one.router) for one in found] == [(1, "router1"), (2, "router2")]
    assert [one.report["router"] for one in found] == ["router1", "router2"]
    (line,) = said
    assert "seed 2" in line
    assert "77" in line
