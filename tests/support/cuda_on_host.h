// Runs CUDA C kernels on a CPU, for tests: a block's threads are fibres of one thread, which take turns
// at every barrier and warp operation. Slow, deterministic, and open to -fsanitize=address,undefined.
// It finds wrong results and wrong addresses; it does not find races.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

static inline int min(int a, int b) { return a < b ? a : b; }

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3_on_host { int x, y, z; };
static dim3_on_host threadIdx, blockIdx, blockDim;

namespace on_host {
struct Fibre {
    ucontext_t context;
    dim3_on_host thread;
    bool is_over;
    int operations;
    std::unique_ptr<char[]> stack;
};
static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static Fibre* running;
static int64_t slots[2][1024];
static int waiting, barriers;
static void (*body)(void*);
static void* argument;

inline void turn() {
    Fibre* me = running;
    swapcontext(&me->context, &scheduler);
}
inline void start() {
    body(argument);
    running->is_over = true;
}
// Gives a value and returns where the warp's 32 values are, once all have given theirs.
inline const int64_t* exchange(int64_t value) {
    Fibre* me = running;
    int64_t* all = slots[me->operations++ & 1];
    all[me->thread.x] = value;
    turn();
    return all + (me->thread.x & ~31);
}
// Threads that have ended count as arrived.
inline void barrier() {
    int mine = barriers;
    waiting++;
    while (mine == barriers) turn();
}

template <class Parameters>
void launch(void (*kernel)(Parameters), Parameters parameters, int blocks_x, int blocks_y, int threads) {
    struct Call { void (*kernel)(Parameters); Parameters parameters; } call = {kernel, parameters};
    body = [](void* c) { ((Call*)c)->kernel(((Call*)c)->parameters); };
    argument = &call;
    const size_t stack_bytes = 256 << 10;
    if (fibres.size() < (size_t)threads) fibres.resize(threads);
    blockDim = {threads, 1, 1};
    for (int y = 0; y < blocks_y; y++)
        for (int x = 0; x < blocks_x; x++) {
            blockIdx = {x, y, 0};
            waiting = barriers = 0;
            for (int t = 0; t < threads; t++) {
                Fibre& f = fibres[t];
                if (!f.stack) f.stack.reset(new char[stack_bytes]);
                f.thread = {t, 0, 0};
                f.is_over = false;
                f.operations = 0;
                getcontext(&f.context);
                f.context.uc_stack.ss_sp = f.stack.get();
                f.context.uc_stack.ss_size = stack_bytes;
                f.context.uc_link = &scheduler;
                makecontext(&f.context, (void (*)())start, 0);
            }
            for (int alive = threads; alive;) {
                alive = 0;
                for (int t = 0; t < threads; t++) {
                    Fibre& f = fibres[t];
                    if (f.is_over) continue;
                    running = &f;
                    threadIdx = f.thread;
                    swapcontext(&scheduler, &f.context);
                    alive += !f.is_over;
                }
                if (waiting && waiting == alive) { waiting = 0; barriers++; }
            }
        }
}
}  // namespace on_host

inline void __syncthreads() { on_host::barrier(); }
inline void __syncwarp() { on_host::exchange(0); }
inline uint32_t __ballot_sync(uint32_t, int flag) {
    const int64_t* all = on_host::exchange(flag != 0);
    uint32_t found = 0;
    for (int lane = 0; lane < 32; lane++) found |= (uint32_t)all[lane] << lane;
    return found;
}
inline int __shfl_sync(uint32_t, int value, int lane) { return (int)on_host::exchange(value)[lane]; }
inline int __shfl_up_sync(uint32_t, int value, int step) {
    int lane = threadIdx.x & 31;
    const int64_t* all = on_host::exchange(value);
    return (int)all[lane >= step ? lane - step : lane];
}
inline int __shfl_xor_sync(uint32_t, int value, int mask) {
    int lane = threadIdx.x & 31;
    return (int)on_host::exchange(value)[lane ^ mask];
}
inline int __clz(uint32_t v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(uint64_t v) { return v ? __builtin_clzll(v) : 64; }
inline int __ffsll(uint64_t v) { return __builtin_ffsll((long long)v); }
inline void atomicOr(uint32_t* at, uint32_t bits) { *at |= bits; }
template <class T> inline void atomicAdd(T* at, T amount) { *at += amount; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t found = 0;
    for (int k = 0; k < 4; k++) found |= (uint32_t)(bytes >> (8 * (selector >> (4 * k) & 7)) & 255) << (8 * k);
    return found;
}
