"""CUDA C that every generated source begins and ends with.

Integers only. `dp4a` multiplies four uint8 codes by four int8 weights and adds the products to an
int32: the mixed form has no intrinsic, so it is written in PTX. Compiled for anything but a GPU,
the same sum is a loop: that is how tests run these kernels.

Sources: CUDA C++ Programming Guide (synchronisation and atomic functions, launch bounds,
read-only data cache); PTX ISA (`dp4a`).
"""

from __future__ import annotations

from typing import Final

from engine.backends.integer_graph import CODE_MAX, PRE_CLIP

STEP_KERNEL: Final = "octick_step"
SERVE_KERNEL: Final = "octick_serve"

TYPES: Final = """\
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

extern __shared__ uint4 arena[];
"""

ARITHMETIC: Final = f"""\
// Item i of a loop that the block shares out, item 0 to thread `offset`.
#define FOR_ITEMS(i, items, offset) \\
    for (int i = (int)((threadIdx.x + THREADS - (offset) % THREADS) % THREADS); i < (items); \\
         i += THREADS)

template <typename T>
static __device__ __forceinline__ T clip(T value, T low, T high)
{{
    return value < low ? low : value > high ? high : value;
}}

// acc / 2**shift, half to even.
template <typename T>
static __device__ __forceinline__ T round_shift(T acc, int shift)
{{
    if (shift < 0)
        return clip<T>(acc, -{PRE_CLIP}, {PRE_CLIP}) * ((T)1 << -shift);
    const T half = shift > 0 ? ((T)1 << shift >> 1) - 1 + ((acc >> shift) & 1) : 0;
    return (acc + half) >> shift;
}}

template <typename T>
static __device__ __forceinline__ int to_code(T acc, int shift, int zero_point)
{{
    return (int)clip<T>(round_shift<T>(acc, shift) + zero_point, 0, {CODE_MAX});
}}

static __device__ __forceinline__ int load_int(const u8* weights, int at)
{{
    return __ldg((const int*)weights + at);
}}

static __device__ __forceinline__ int look_up(const u8* table, int code)
{{
    return (int)__ldg(table + code);
}}

static __device__ __forceinline__ int dot4(u32 codes, u32 weights, int acc)
{{
#ifdef __CUDA_ARCH__
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(acc) : "r"(codes), "r"(weights));
#else
    for (int bit = 0; bit < 32; bit += 8)
        acc += (int)(u8)(codes >> bit) * (int)(signed char)(u8)(weights >> bit);
#endif
    return acc;
}}

static __device__ __forceinline__ int dot4(uint2 codes, uint2 weights, int acc)
{{
    return dot4(codes.y, weights.y, dot4(codes.x, weights.x, acc));
}}

static __device__ __forceinline__ int dot4(uint4 codes, uint4 weights, int acc)
{{
    acc = dot4(codes.y, weights.y, dot4(codes.x, weights.x, acc));
    return dot4(codes.w, weights.w, dot4(codes.z, weights.z, acc));
}}

// Codes of a row times the weights of one output, in vectors of type V.
template <typename V, int COUNT, int OUTPUTS>
static __device__ __forceinline__ int dot(const u8* codes, const u8* weights, int output)
{{
    const V* x = (const V*)codes;
    const V* w = (const V*)weights + output;
    int acc = 0;
#pragma unroll 8
    for (int k = 0; k < COUNT; ++k)
        acc = dot4(x[k], __ldg(w + k * OUTPUTS), acc);
    return acc;
}}

// The same where a row may begin at any byte.
template <int INPUTS, int OUTPUTS>
static __device__ __forceinline__ int dot_bytes(const u8* codes, const u8* weights, int output)
{{
    const u32* w = (const u32*)weights + output;
    int acc = 0;
#pragma unroll 4
    for (int k = 0; k < INPUTS; k += 4) {{
        u32 word = 0;
        for (int b = 0; b < 4; ++b)
            if (k + b < INPUTS)
                word |= (u32)codes[k + b] << (8 * b);
        acc = dot4(word, __ldg(w + k / 4 * OUTPUTS), acc);
    }}
    return acc;
}}
"""

KERNELS: Final = f"""\
static __device__ __forceinline__ u64 stamped(u32 word, u32 sequence)
{{
    return (u64)sequence << 32 | word;
}}

// Before the barrier behind which a step begins.
static __device__ __forceinline__ void clear_counts(u8* values)
{{
    for (int g = threadIdx.x; g < GROUPS; g += THREADS)
        ((u32*)(values + COUNTS_AT))[g] = 0;
    if (threadIdx.x == 0)
        *(u32*)(values + MASK_AT) = 0;
}}

static __device__ __forceinline__ void answer(const u8* values, volatile u64* reply, u32 sequence)
{{
    for (int j = threadIdx.x; j < OUTPUTS; j += THREADS)
        reply[1 + j] = stamped((u32)OUTPUT(values, j), sequence);
    if (threadIdx.x == 0)
        reply[0] = stamped(*(const u32*)(values + MASK_AT), sequence);
}}

// One request, which is there already.
extern "C" __global__ void __launch_bounds__(THREADS)
{STEP_KERNEL}(const volatile u64* request, volatile u64* reply, const u8* __restrict__ weights)
{{
    u8* values = (u8*)arena;
    clear_counts(values);
    for (int w = threadIdx.x; w < REQUEST_WORDS; w += THREADS) {{
        const u64 word = request[w];
        ((u32*)values)[w] = (u32)word;
        if (w == 0)
            *(u32*)(values + SEQUENCE_AT) = (u32)(word >> 32);
    }}
    __syncthreads();
    step(values, weights);
    answer(values, reply, *(const u32*)(values + SEQUENCE_AT));
}}

// One request after the other, from this sequence on, until one says stop or none comes for long.
extern "C" __global__ void __launch_bounds__(THREADS)
{SERVE_KERNEL}(const volatile u64* request, volatile u64* reply, const u8* __restrict__ weights,
             u32 sequence, u32 launch, u32 idle_polls)
{{
    u8* values = (u8*)arena;
    for (;; ++sequence) {{
        clear_counts(values);
        for (u32 idle = 0;; ++idle) {{
            int here = 1;
            for (int w = threadIdx.x; w < REQUEST_WORDS; w += THREADS) {{
                const u64 word = request[w];
                if ((u32)(word >> 32) == sequence)
                    ((u32*)values)[w] = (u32)word;
                else
                    here = 0;
            }}
            if (__syncthreads_and(here))
                break;
            if (idle == idle_polls) {{
                if (threadIdx.x == 0)
                    reply[RETIRED_WORD] = stamped(launch, sequence);
                return;
            }}
        }}
        if (((const u32*)values)[COMMAND_WORD] == STOP) {{
            if (threadIdx.x == 0)
                reply[RETIRED_WORD] = stamped(launch, sequence);
            return;
        }}
        step(values, weights);
        answer(values, reply, sequence);
    }}
}}
"""
