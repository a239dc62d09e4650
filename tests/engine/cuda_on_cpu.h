// As much of CUDA as a generated kernel uses, on a CPU: one block, each thread a fiber.
//
// The fibers of a block run one after the other, in either order, from barrier to barrier, so that
// a kernel which lacks a barrier gives other bits in one order than in the other. Shared memory
// begins with rubbish.

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <sched.h>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__ thread_local
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };

template <typename T> static inline T __ldg(const T* pointer) { return *pointer; }

static inline unsigned atomicAdd(unsigned* at, unsigned value)
{
    const unsigned before = *at;
    *at += value;
    return before;
}

static inline unsigned atomicOr(unsigned* at, unsigned value)
{
    const unsigned before = *at;
    *at |= value;
    return before;
}

static thread_local Index threadIdx;

namespace block {

constexpr size_t SHARED_BYTES = 256 << 10;
constexpr size_t STACK_BYTES = 32 << 10;
constexpr int DONE = 0, FAILED = 1;

struct Fiber {
    ucontext_t context;
    bool waits, finished;
    int predicate;
};

struct Block {
    std::vector<Fiber> fibers;
    std::function<void()> kernel;
    ucontext_t scheduler;
    unsigned now;
    int all;
};

static thread_local Block* current;
static thread_local std::vector<std::unique_ptr<char[]>> stacks; // kept from launch to launch

static int barrier(int predicate)
{
    Block& b = *current;
    Fiber& fiber = b.fibers[b.now];
    fiber.predicate = predicate;
    fiber.waits = true;
    swapcontext(&fiber.context, &b.scheduler);
    return b.all;
}

static void begin()
{
    current->kernel();
    current->fibers[current->now].finished = true;
}

// FAILED where some threads wait at a barrier that others never reach.
static int run(unsigned threads, bool backwards, std::function<void()> kernel)
{
    Block b;
    b.fibers.resize(threads);
    b.kernel = kernel;
    current = &b;
    while (stacks.size() < threads)
        stacks.emplace_back(new char[STACK_BYTES]);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = b.fibers[i];
        fiber.waits = fiber.finished = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i].get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &b.scheduler;
        makecontext(&fiber.context, begin, 0);
    }
    for (;;) {
        unsigned waiting = 0, finished = 0;
        for (unsigned i = 0; i < threads; ++i) {
            b.now = backwards ? threads - 1 - i : i;
            threadIdx.x = b.now;
            Fiber& fiber = b.fibers[b.now];
            fiber.waits = false;
            swapcontext(&b.scheduler, &fiber.context);
            waiting += fiber.waits;
            finished += fiber.finished;
        }
        if (finished == threads)
            return DONE;
        if (waiting != threads)
            return FAILED;
        b.all = 1;
        for (const Fiber& fiber : b.fibers)
            b.all = b.all && fiber.predicate;
        if (!b.all)
            sched_yield();
    }
}

} // namespace block

static inline void __syncthreads() { block::barrier(1); }
static inline int __syncthreads_and(int predicate) { return block::barrier(predicate); }

constexpr unsigned GUARD_BYTES = 4 << 10; // behind what the kernel asked for: must stay as it is
thread_local uint4 arena[(block::SHARED_BYTES + GUARD_BYTES) / sizeof(uint4)];

// A kernel whose arguments come as 64-bit words, whatever their type.
template <typename... A>
static int launch(void (*kernel)(A...), unsigned threads, unsigned shared_bytes, bool backwards,
                  const uint64_t* words)
{
    unsigned char* const shared = (unsigned char*)arena;
    std::memset(shared, 0xa5, shared_bytes + GUARD_BYTES);
    auto take = [&words](auto* type) {
        typename std::remove_pointer<decltype(type)>::type value;
        std::memcpy(&value, words++, sizeof value);
        return value;
    };
    std::tuple<A...> arguments{take((A*)nullptr)...};
    const int status = block::run(threads, backwards, [&] { std::apply(kernel, arguments); });
    for (unsigned i = 0; i < GUARD_BYTES; ++i)
        if (shared[shared_bytes + i] != 0xa5)
            return block::FAILED;
    return status;
}
