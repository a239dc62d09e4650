"""The `cuda` backend: CUDA C generated from the integer graph, one fused kernel a step.

A step is one block of threads on one multiprocessor, from the input's codes to the accumulators of
the scores and the mask of the value check: all layers in one kernel, with barriers only where a
thread reads what another one wrote. Products are `dp4a` (four uint8 by four int8 into an int32);
weights are uploaded once and stay. NVRTC compiles the source through CuPy when a bundle is opened,
for the GPU at hand.

Codes and answers go through pinned host memory that the GPU reads and writes itself: no copy is
queued. Each 64-bit word of it carries 32 bits of data and the number of its request, so that
whoever waits for a word sees by the word itself that it is there (`engine.backends.cuda.source`).

Two devices for each GPU:

``cuda:0``
    The kernel is captured once in a CUDA graph; a step writes the request, launches the graph and
    watches for the answer. The GPU is idle between two steps, and anybody else's. What a launch
    costs, on the CPU and until the kernel runs, is paid at every step.

``cuda:0/persistent``
    The kernel stays on the GPU and polls the request; a step is two crossings of the bus and the
    kernel's own time, no launch, and weights that fit are still in the first-level cache. The
    price: a multiprocessor that is never free, a bus that carries polls, and a GPU on which
    whatever waits for all work to end (allocation, other modules being loaded, another model being
    opened) waits for this kernel. So it leaves by itself when no request came for some seconds,
    and comes back with the next one, which pays the launch. Not on a GPU that drives a display:
    its driver ends kernels that run for long.

Both give the same bits. A stream's state is in device memory, in ring buffers and pairs of copies
that no step overwrites before its answer is in: a step that failed raises `RuntimeError` and
leaves the state as it was, and where only its launch was refused it may be done again.

A graph whose values do not fit into one block's shared memory is refused. One multiprocessor makes
at most a few hundred multiplications a clock: a model of many millions of them is better served by
a backend that uses the whole GPU.
"""
