"""The hot path keeps to its core, and everything else keeps off it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cores
from feeds.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, subprocess, sys, threading
import zmq
from engine import cores
def of_zeromq():
    for thread in os.listdir('/proc/self/task'):
        if open(f'/proc/self/task/{thread}/comm').read().startswith('ZMQbg'):
            yield sorted(os.sched_getaffinity(int(thread)))
context = zmq.Context()
socket = context.socket(zmq.PUB)
ready, done = threading.Event(), threading.Event()
other = []
def rest():
    other.append(threading.get_native_id())
    ready.set()
    done.wait()
thread = threading.Thread(target=rest)
thread.start()
ready.wait()
allowed = os.sched_getaffinity(0)
core = max(allowed)
while len(list(of_zeromq())) < 2:  # a thread gives itself its name
    pass
cores.keep_to(core, core if WITH else -1)
zeromq = list(of_zeromq())
own = sorted(os.sched_getaffinity(0))
others = sorted(os.sched_getaffinity(other[0]))
ask = "import os; print(sorted(os.sched_getaffinity(0)))"
child = subprocess.run([*cores.beside(), sys.executable, "-c", ask], capture_output=True, text=True)
cores.let_go()
done.set()
after = sorted(os.sched_getaffinity(0))
print(json.dumps([sorted(allowed), core, own, others, json.loads(child.stdout), after, zeromq]))
socket.close()
context.term()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("shared", [False, True])
def test_this_thread_has_the_core_and_threads_and_children_have_the_others(
    shared: bool,
) -> None:
    program = PROGRAM.replace("WITH", str(shared))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    allowed, core, own, others, child, after, zeromq = json.loads(done.stdout)
    rest = [number for number in allowed if number != core]
    assert own == [core]
    assert others == rest
    assert child == rest
    assert after == allowed
    assert zeromq
    assert all(found == ([core] if shared else rest) for found in zeromq)


def test_a_core_that_is_not_ours_is_refused() -> None:
    with pytest.raises(InputError, match=r"loop\.core"):
        cores.keep_to(4_000)
    with pytest.raises(InputError, match=r"loop\.io_core"):
        cores.keep_to(min(os.sched_getaffinity(0)), 4_000)
    assert cores.beside() == []


def test_nobody_gathers_the_memory_of_a_process_that_refuses_nor_of_its_children() -> None:
    ask = "print(open('/proc/self/status').read())"
    program = (
        "import subprocess, sys\nfrom engine.cores import refuse_huge_pages\n"
        f"ask = {ask!r}\nif refuse_huge_pages():\n    exec(ask)\n"
        "    subprocess.run([sys.executable, '-c', ask], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("THP_enabled")]
    if not told:
        pytest.skip("this kernel does not refuse, or does not tell")
    assert told == ["0", "0"]


POLICIES = """
import ctypes, os, struct
from engine import cores
def scheduled():
    got = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, 0, got, 48, 0) == 0
    _, policy, _, _, _, slice_ns, *_ = struct.unpack("<IIQiIQQQ", got.raw)
    return policy, slice_ns
usual = scheduled()
told = cores.be_prompt()
prompt = scheduled()
cores.be_patient()
print(*usual, *prompt, *scheduled(), int(told), os.SCHED_BATCH)
"""


def test_who_is_patient_asks_for_no_short_slices_even_where_it_had_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", POLICIES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    usual, slice_ns, prompt, short_ns, patient, after_ns, told, batch = map(
        int, done.stdout.split()
    )
    assert (usual, prompt, patient) == (0, 0, batch)
    assert after_ns == slice_ns
    if told and slice_ns:  # else a kernel before 6.12, which tells of none
        assert short_ns == cores.SLICE_NS < slice_ns
