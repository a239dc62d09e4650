"""From an integer graph to one CUDA C source: a kernel for one step, and one that stays.

The request, in host memory, is words of 64 bits: a header, then four codes a word, each with the
request's sequence number in its upper half. The answer likewise: the mask of the value check, then
an int32 a word. A word is read and written as one, so its number says that its data is there, and
no word waits for another: one trip over the bus each way, and no fence. This is the LL protocol
of NCCL (Hu et al., "Demystifying NCCL", 2025, section on LL; arXiv:2507.04786).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from engine.backends.cuda import prelude
from engine.backends.cuda.cells import gru, lstm
from engine.backends.cuda.layers import (
    COUNTS,
    Memory,
    add,
    columns,
    concat,
    delay,
    dense_codes,
    dense_scores,
    maximum,
    table,
)
from engine.backends.cuda.layout import ALIGNMENT_BYTES, CODES_A_WORD
from engine.backends.cuda.schedule import Operation, Placed, Read, block_threads, schedule
from engine.backends.integer_graph import (
    INPUT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    IntegerGraph,
    Layer,
    LstmCell,
    Maximum,
    Table,
)

# Words of a request's header.
COMMAND_WORD: Final = 0
POSITION_WORD: Final = 1  # steps since the stream began
STATE_WORD: Final = 2  # address of the stream's state, lower half; the upper one follows
HEADER_WORDS: Final = 4
# Commands.
STEP: Final = 0
STOP: Final = 1

_HEADER: Final = "header"
_MASK: Final = "mask"
_SEQUENCE: Final = "sequence"


@dataclass(frozen=True)
class CudaSource:
    """What a device needs to run one graph.

    Attributes
    ----------
    code : str
        CUDA C++ of `prelude.STEP_KERNEL` and `prelude.SERVE_KERNEL`, for one block.
    weights : ndarray of uint8
        To upload once.
    threads : int
    shared_bytes : int
        Dynamic shared memory of the block.
    state_bytes : int
        Of each stream, in device memory; not initialised.
    n_features, n_outputs : int
    """

    code: str = field(repr=False)
    weights: np.ndarray = field(repr=False)
    threads: int
    shared_bytes: int
    state_bytes: int
    n_features: int
    n_outputs: int

    @property
    def request_words(self) -> int:
        """64-bit words of a request."""
        return HEADER_WORDS + -(-self.n_features // CODES_A_WORD)

    @property
    def reply_words(self) -> int:
        """64-bit words of an answer: mask, outputs, and one in which a kernel says it is gone."""
        return self.n_outputs + 2


def generate(graph: IntegerGraph, threads: int | None = None) -> CudaSource:
    """The source of a graph.

    Parameters
    ----------
    graph : IntegerGraph
    threads : int, optional
        Of the block; by default as many as have something to do.

    Raises
    ------
    InputError
        If an accumulator may leave int32.
    """
    memory = Memory(graph)
    memory.values.add(_HEADER, 4 * HEADER_WORDS)
    memory.values.add(INPUT, graph.n_features)  # right behind: a request is read word by word
    operations = [op for layer in graph.layers for op in _operations(memory, layer)]
    checks = len(graph.checks)
    for name, size in ((COUNTS, 4 * checks), (_MASK, 4), (_SEQUENCE, 4)):
        memory.values.add(name, size)
    if checks:
        operations.append(_mask(memory))
    phases = schedule(operations)
    threads = threads or block_threads(phases)
    scores = graph.scores is not None
    last = memory.at(graph.layers[-1].name)
    constants = {
        "THREADS": threads,
        "GROUPS": checks,
        "COUNTS_AT": memory.values[COUNTS],
        "MASK_AT": memory.values[_MASK],
        "SEQUENCE_AT": memory.values[_SEQUENCE],
        "REQUEST_WORDS": HEADER_WORDS + -(-graph.n_features // CODES_A_WORD),
        "OUTPUTS": graph.n_outputs,
        "COMMAND_WORD": COMMAND_WORD,
        "STOP": STOP,
        "RETIRED_WORD": 1 + graph.n_outputs,
    }
    parts = [
        "// Generated from an integer graph: one step of it, by one block of threads.",
        prelude.TYPES,
        "\n".join(f"constexpr int {name} = {value};" for name, value in constants.items()) + "\n",
        f"#define OUTPUT(values, j) {f'((const int*){last})[j]' if scores else f'{last}[j]'}\n",
        prelude.ARITHMETIC,
        _step(phases),
        prelude.KERNELS,
    ]
    return CudaSource(
        code="\n".join(parts),
        weights=memory.blob.join(),
        threads=threads,
        shared_bytes=memory.values.size + ALIGNMENT_BYTES,
        state_bytes=memory.state.size,
        n_features=graph.n_features,
        n_outputs=graph.n_outputs,
    )


def _operations(memory: Memory, layer: Layer) -> list[Operation]:
    if isinstance(layer, Dense):
        if layer.point is None:
            return [dense_scores(memory, layer)]
        return [dense_codes(memory, layer, layer.name, ((0, layer.point),))]
    if isinstance(layer, Delay):
        return delay(memory, layer)
    if isinstance(layer, Add):
        return [add(memory, layer)]
    if isinstance(layer, Table):
        return [table(memory, layer)]
    if isinstance(layer, Maximum):
        return [maximum(memory, layer)]
    if isinstance(layer, Columns):
        return [columns(memory, layer)]
    if isinstance(layer, Concat):
        return concat(memory, layer)
    if isinstance(layer, LstmCell):
        return lstm(memory, layer)
    return gru(memory, layer)


def _mask(memory: Memory) -> Operation:
    """Groups with more saturated codes than they may have."""
    checks = memory.graph.checks
    limits = memory.weights(np.array([check.limit for check in checks], dtype=np.int32))
    masks = memory.weights(np.array([check.mask for check in checks], dtype=np.uint32))
    counts, mask = f"(u32*){memory.at(COUNTS)}", f"(u32*){memory.at(_MASK)}"
    return Operation(
        note=f"value check: {len(checks)} groups",
        items=len(checks),
        body=f"if (({counts})[i] > (u32)load_int({limits}, i))\n"
        f"    atomicOr({mask}, (u32)load_int({masks}, i));",
        reads=(Read(COUNTS),),
        writes=(_MASK,),
    )


def _step(phases: list[list[Placed]]) -> str:
    """The function of one step, whose input and counts a barrier has made visible."""
    body = [
        "const u32* header = (const u32*)values;",
        f"const u32 position = header[{POSITION_WORD}];",
        f"u8* state = (u8*)((u64)header[{STATE_WORD + 1}] << 32 | header[{STATE_WORD}]);",
        "(void)position, (void)state;",
    ]
    for phase in phases:
        body += [_loop(placed) for placed in phase]
        body.append("__syncthreads();")
    lines = textwrap.indent("\n".join(body), "    ")
    return (
        "static __device__ __forceinline__ void step(u8* values, const u8* __restrict__ weights)\n"
        f"{{\n{lines}\n}}\n"
    )


def _loop(placed: Placed) -> str:
    operation = placed.operation
    lines = [
        f"{{ // {operation.note}",
        *_indented(operation.before),
        f"    FOR_ITEMS(i, {operation.items}, {placed.offset}) {{",
        *_indented(operation.body, 2),
        "    }",
        *_indented(operation.after),
        "}",
    ]
    return "\n".join(lines)


def _indented(statements: str, levels: int = 1) -> list[str]:
    return [textwrap.indent(statements, "    " * levels)] if statements else []
