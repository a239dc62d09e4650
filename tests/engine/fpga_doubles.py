"""Stand-ins for cards and their vendors' Python modules, after the vendors' documentation.

`xrt_module` is AMD's ``pyxrt``, `vollo_module` is Myrtle.ai's ``vollo_rt``. They are as strict as
the documents allow a card to be: what was not synchronised is not there, what was queued may run
in any order, an input is read when the job runs, and whatever an earlier process left is left.
A `Fault` makes one of them wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import IntegerGraph
from engine.manifest import StateTensor


@dataclass
class Fault:
    """What is wrong with a card; nothing by default.

    Attributes
    ----------
    score, mask : int or float
        Added to the first score, or to the mask of the value check.
    deaf_to_reset, one_state : bool
        A reset does nothing; all streams share one state.
    fails_at, hangs_at : int
        Number of the inference, from 0, that does not end well, or not at all.
    """

    score: float = 0
    mask: int = 0
    deaf_to_reset: bool = False
    one_state: bool = False
    fails_at: int = -1
    hangs_at: int = -1


# AMD: pyxrt.


class State(IntEnum):
    """`pyxrt.ert_cmd_state`."""

    ERT_CMD_STATE_NEW = 1
    ERT_CMD_STATE_QUEUED = 2
    ERT_CMD_STATE_COMPLETED = 4
    ERT_CMD_STATE_ERROR = 5
    ERT_CMD_STATE_SUBMITTED = 7


class Direction(IntEnum):
    """`pyxrt.xclBOSyncDirection`."""

    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


class DeviceInfo:
    """`pyxrt.xrt_info_device`, of which only this is asked."""

    name = object()


@dataclass
class XrtHardware:
    """The card in slot 0: the circuit of a graph, and who holds it.

    Attributes
    ----------
    slow : int
        How often a run is looked at before it is complete.
    loaded : str
        Path of the ``.xclbin``.
    held : set of str
        Compute units that some process has for itself.
    """

    graph: IntegerGraph
    fault: Fault = field(default_factory=Fault)
    slow: int = 2
    loaded: str = ""
    held: set[str] = field(default_factory=set)
    queue: list[Any] = field(default_factory=list)
    states: dict[int, GraphReference] = field(default_factory=dict)
    inferences: int = 0

    def step(self) -> None:
        """Run one of what is queued: the youngest, since no order is promised."""
        number, self.inferences = self.inferences, self.inferences + 1
        if number == self.fault.hangs_at:
            self.slow = 1 << 60
        if self.slow == 1 << 60:
            return
        run = self.queue.pop()
        if number == self.fault.fails_at:
            run.now = State.ERT_CMD_STATE_ERROR
            return
        stream, flags, codes, answer = run.arguments
        acc, mask = self._answer(stream, flags, np.frombuffer(codes.card, np.uint8).copy())
        acc[0] += int(self.fault.score)
        words = [*acc.tolist(), mask ^ self.fault.mask]
        answer.card[:] = np.array(words, dtype=np.int64).astype(np.int32).tobytes()
        run.now = State.ERT_CMD_STATE_COMPLETED

    def _answer(self, stream: int, flags: int, codes: np.ndarray) -> tuple[np.ndarray, int]:
        key = 0 if self.fault.one_state else stream
        if key not in self.states:
            self.states[key] = GraphReference(self.graph)
            self.states[key].step_codes(codes ^ 0x55)  # what an earlier process left
        if flags & 1 and not self.fault.deaf_to_reset:
            self.states[key].reset()
        return self.states[key].step_codes(codes)


def xrt_module(hardware: XrtHardware) -> ModuleType:
    """``pyxrt`` on a machine with one card, 0000:65:00.1."""

    class Xclbin:
        def __init__(self, path: str) -> None:
            try:
                self._kernels = json.loads(Path(path).read_text())
            except ValueError:
                raise RuntimeError("bad magic") from None

        def get_kernels(self) -> list[Any]:
            return [KernelOfXclbin(*item) for item in self._kernels.items()]

    class KernelOfXclbin:
        def __init__(self, name: str, arguments: int) -> None:
            self.get_name: Callable[[], str] = lambda: name
            self.get_num_args: Callable[[], int] = lambda: arguments

    class Uuid:
        def to_string(self) -> str:
            return "00000000-1111-2222-3333-444444444444"

    class Device:
        def __init__(self, which: int | str) -> None:
            if which not in (0, "0000:65:00.1"):
                raise RuntimeError(f"No such device '{which}'")

        def load_xclbin(self, path: str) -> Uuid:
            Xclbin(path)
            hardware.loaded = path
            return Uuid()

        def get_info(self, key: object) -> str:
            assert key is DeviceInfo.name
            return "xilinx_u250_gen3x16_xdma_shell_4_1"

    class Kernel:
        exclusive, shared, none = range(3)

        def __init__(self, device: Device, uuid: Uuid, name: str, mode: int) -> None:
            kernel, _, unit = name.rstrip("}").partition(":{")
            names = [item.get_name() for item in Xclbin(hardware.loaded).get_kernels()]
            if kernel not in names or unit != f"{kernel}_1":
                raise RuntimeError(f"No compute units matching '{name}'")
            if unit in hardware.held:
                raise RuntimeError(f"failed to acquire '{unit}': Device or resource busy")
            self.unit = unit
            if mode == self.exclusive:
                hardware.held.add(unit)

        def __del__(self) -> None:
            hardware.held.discard(getattr(self, "unit", ""))

        def group_id(self, argument: int) -> int:
            if argument not in (2, 3):
                raise RuntimeError("no memory bank for a scalar")
            return 10 + argument

    class Buffer:
        normal = 0

        def __init__(self, device: Device, size: int, flags: int, group: int) -> None:
            self.group = group
            self.host, self.card = bytearray(size), bytearray(b"\xaa" * size)

        def map(self) -> memoryview:
            return memoryview(self.host)

        def sync(self, direction: Direction, size: int, offset: int) -> None:
            part = slice(offset, offset + size)
            if direction is Direction.XCL_BO_SYNC_BO_TO_DEVICE:
                self.card[part] = self.host[part]
            else:
                self.host[part] = self.card[part]

    class Run:
        def __init__(self, kernel: Kernel) -> None:
            self._kernel = kernel
            self._given: dict[int, Any] = {}
            self._looks = 0
            self.now = State.ERT_CMD_STATE_NEW
            self.arguments: tuple[Any, ...] = ()

        def set_arg(self, index: int, value: Any) -> None:
            if isinstance(value, Buffer):
                assert value.group == self._kernel.group_id(index)
            else:
                assert isinstance(value, int)
                assert index in (0, 1)
            self._given[index] = value

        def start(self) -> None:
            if self in hardware.queue:
                raise RuntimeError("bad command state, can't launch")
            self.arguments = tuple(self._given[i] for i in range(4))
            self.now, self._looks = State.ERT_CMD_STATE_SUBMITTED, 0
            hardware.queue.append(self)

        def state(self) -> State:
            self._looks += 1
            if hardware.queue and self._looks > hardware.slow:
                hardware.step()
            return self.now

        def wait(self, timeout_ms: int) -> State:
            assert timeout_ms > 0, "0 waits for ever"
            while self in hardware.queue:
                before = len(hardware.queue)
                hardware.step()
                if len(hardware.queue) == before:  # the time is up
                    break
            return self.now

    found: Any = ModuleType("pyxrt")
    found.xclbin, found.device, found.kernel, found.bo, found.run = (
        Xclbin,
        Device,
        Kernel,
        Buffer,
        Run,
    )
    found.ert_cmd_state, found.xclBOSyncDirection = State, Direction
    found.xrt_info_device = DeviceInfo
    return found  # type: ignore[no-any-return]


# Myrtle.ai: vollo_rt.


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to 8 significant bits, half to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


@dataclass
class VolloHardware:
    """Card 0, of 6 cores of block size 32, and the float model that its programs are made from.

    Attributes
    ----------
    model : bytes
        ONNX, without a value check.
    state : sequence of StateTensor
    slow : int
        Polls that a job takes.
    """

    model: bytes
    state: Sequence[StateTensor] = ()
    fault: Fault = field(default_factory=Fault)
    slow: int = 2
    contexts: int = 0
    inferences: int = 0

    def write_program(self, path: Path, **changed: Any) -> None:
        """What the vendor's compiler would write."""
        program = {
            "name": None,
            "models": 1,
            "block_size": 32,
            "streaming": bool(self.state),
            "resettable": bool(self.state),
            "ends": [1, 1],
            "input_shape": [1, 96],
            "output_shape": [1, 3],
        }
        path.write_text(json.dumps(program | changed))


class _Model:
    """One model of a loaded program, with its own state."""

    def __init__(self, hardware: VolloHardware) -> None:
        self._hardware = hardware
        self._session = ort.InferenceSession(hardware.model, providers=["CPUExecutionProvider"])
        self.reset()

    def reset(self) -> None:
        self._state = {tensor.input: tensor.fresh() for tensor in self._hardware.state}

    def run(self, x: np.ndarray) -> np.ndarray:
        feeds = {self._session.get_inputs()[0].name: bfloat16(x), **self._state}
        scores, *after = self._session.run(None, feeds)
        for tensor, array in zip(self._hardware.state, after, strict=True):
            self._state[tensor.input] = bfloat16(array)
        return bfloat16(scores)


def vollo_module(hardware: VolloHardware, *, sdk: int = 29) -> ModuleType:
    """``vollo_rt`` on a machine with one card; before SDK 28 it says nothing of resets."""

    class VolloRTContext:
        def __init__(self) -> None:
            self._program: dict[str, Any] = {}
            self._models: list[_Model] = []
            self._added = False
            self._jobs: list[tuple[int, int, Any]] = []
            self._results: dict[int, np.ndarray] = {}
            self._next = 1
            self._polls = 0

        def __enter__(self) -> Self:
            if hardware.contexts:
                raise RuntimeError("contexts should not be nested")
            hardware.contexts += 1
            return self

        def __exit__(self, *_: object) -> None:
            hardware.contexts -= 1

        def add_accelerator(self, accelerator_index: int) -> None:
            if accelerator_index != 0:
                raise RuntimeError(f"no accelerator at index {accelerator_index}")
            self._added = True

        def accelerator_num_cores(self, accelerator_index: int) -> int:
            assert self._added
            return 6

        def accelerator_block_size(self, accelerator_index: int) -> int:
            assert self._added
            return 32

        def load_program(self, program: str) -> None:
            assert self._added
            assert not self._program, "once a context"
            try:
                found = json.loads(Path(program).read_text())
            except ValueError:
                raise RuntimeError("not a Vollo program") from None
            if found["block_size"] != 32:
                raise RuntimeError("program is for another hw_config")
            self._program = found
            self._models = [_Model(hardware) for _ in range(found["models"])]

        def num_models(self) -> int:
            return len(self._models)

        def model_name(self, model_index: int = 0) -> str | None:
            return self._program["name"]  # type: ignore[no-any-return]

        def model_num_inputs(self, model_index: int = 0) -> int:
            return int(self._program["ends"][0])

        def model_num_outputs(self, model_index: int = 0) -> int:
            return int(self._program["ends"][1])

        def model_input_shape(self, model_index: int = 0, input_index: int = 0) -> tuple[int, ...]:
            return tuple(self._program["input_shape"])

        def model_output_shape(
            self, model_index: int = 0, output_index: int = 0
        ) -> tuple[int, ...]:
            return tuple(self._program["output_shape"])

        def model_input_streaming_dim(self, model_index: int = 0) -> int | None:
            return 0 if self._program["streaming"] else None

        def add_job_f32(self, inputs: np.ndarray, model_index: int = 0) -> int:
            assert inputs.dtype == np.float32
            assert inputs.shape == self.model_input_shape(model_index)
            job, self._next = self._next, self._next + 1
            self._jobs.append((job, model_index, inputs))
            return job

        def add_reset_job(self, model_index: int = 0) -> None:
            assert self._program["resettable"], "compiled without generate_state_reset"
            # Only that it comes before later jobs is promised.
            self._jobs.insert(0, (0, model_index, None))

        def poll(self) -> list[int]:
            complete: list[int] = []
            self._polls += 1
            while self._jobs and self._polls > hardware.slow:
                job, index, inputs = self._jobs.pop(0)
                if inputs is None:
                    if not hardware.fault.deaf_to_reset:
                        self._models[index].reset()
                    continue
                number, hardware.inferences = hardware.inferences, hardware.inferences + 1
                if number == hardware.fault.fails_at:
                    raise RuntimeError("DMA error")
                if number == hardware.fault.hangs_at:
                    hardware.slow = 1 << 60
                    break
                scores = self._models[0 if hardware.fault.one_state else index].run(inputs)
                scores[0, 0] += hardware.fault.score
                self._results[job] = scores.reshape(self.model_output_shape(index))
                complete.append(job)
                self._polls = 0
            return complete

        def get_result(self, user_ctx: int) -> np.ndarray:
            return self._results.pop(user_ctx)

    class VolloRTContext28(VolloRTContext):
        def model_is_resettable(self, model_index: int = 0) -> bool:
            return bool(self._program["resettable"])

    found: Any = ModuleType("vollo_rt")
    found.VolloRTContext = VolloRTContext28 if sdk >= 28 else VolloRTContext
    return found  # type: ignore[no-any-return]
