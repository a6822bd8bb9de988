// Runs a grid of a kernel on one CPU thread. Every GPU thread is a fiber that runs until it waits; whoever waits for a barrier or
// a shuffle goes on when all that belong to it are there. In which order threads run, and blocks, the seed says.
#include "shim.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <ucontext.h>
#include <vector>

namespace emulator {

Dim3 thread_index, block_index;

namespace {

constexpr size_t STACK_BYTES = 64 << 10, SHARED_BYTES = 48 << 10;
constexpr unsigned WARP = 32;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    State state;
    bool yes;           // brought to the barrier
    unsigned shuffles;  // done so far: their parity chooses the slot
    uint64_t brought[2];
};

std::mutex one_grid;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber *running;
unsigned running_number;
jmp_buf scheduler;
ucontext_t first_return;
Entry entry;
const void *arguments;
unsigned barrier_answer;
alignas(16) unsigned char block_memory[SHARED_BYTES];
Kernel *kernels;

[[noreturn]] void give_up(const char *what) {
    std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block_index.x, running_number);
    std::abort();
}

// Back to the scheduler, until it resumes this fiber. setjmp and not swapcontext, which makes a system call each time.
void wait(State state) {
    running->state = state;
    if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

// A fiber runs one thread after another of the same number, block after block.
void fiber_main() {
    if (_setjmp(running->resume) == 0) swapcontext(&running->context, &first_return);
    for (;;) {
        entry(arguments);
        wait(State::done);
    }
}

void make_fibers(unsigned count) {
    while (fibers.size() < count) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = std::make_unique<char[]>(STACK_BYTES);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        running = fiber.get();
        swapcontext(&first_return, &fiber->context);
        fibers.push_back(std::move(fiber));
    }
}

void run(unsigned number) {
    running_number = number;
    running = fibers[number].get();
    thread_index = {number, 0, 0};
    if (_setjmp(scheduler) == 0) _longjmp(running->resume, 1);
}

// Threads of `[from, to)` in a state.
unsigned count(unsigned from, unsigned to, State state) {
    unsigned n = 0;
    for (unsigned i = from; i < to; i++) n += fibers[i]->state == state;
    return n;
}

// Lets a warp go on from a shuffle that all of it has come to.
bool release_warp(unsigned warp) {
    if (count(warp, warp + WARP, State::in_warp) < WARP) return false;
    for (unsigned i = warp; i < warp + WARP; i++) fibers[i]->state = State::ready;
    return true;
}

// Lets the block go on from a barrier that all of it has come to.
bool release_block(unsigned threads) {
    if (count(0, threads, State::at_barrier) < threads) return false;
    barrier_answer = 0;
    for (unsigned i = 0; i < threads; i++) {
        barrier_answer += fibers[i]->yes;
        fibers[i]->state = State::ready;
    }
    return true;
}

struct Random {
    uint64_t state;
    uint64_t below(uint64_t limit) {
        // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return (z ^ (z >> 31)) % limit;
    }
};

std::vector<unsigned> shuffled(unsigned count, Random &random, bool permute) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = count; permute && i > 1; i--) std::swap(order[i - 1], order[random.below(i)]);
    return order;
}

// A warp runs as far ahead of the others as it can, to the next barrier: where one is missing, somebody reads what is not there
// yet, or no longer.
void run_warp(unsigned warp, const std::vector<unsigned> &lanes) {
    do {
        for (unsigned lane : lanes) {
            while (fibers[warp + lane]->state == State::ready) run(warp + lane);
        }
    } while (release_warp(warp));
}

void run_block(unsigned threads, const std::vector<unsigned> &warps, const std::vector<unsigned> &lanes) {
    std::memset(block_memory, 0xff, sizeof block_memory);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i]->state = State::ready;
        fibers[i]->shuffles = 0;
    }
    do {
        for (unsigned warp : warps) run_warp(warp * WARP, lanes);
    } while (release_block(threads));
    if (count(0, threads, State::done) < threads) {
        give_up("threads wait for others that never come: a barrier or shuffle in divergent code");
    }
}

} // namespace

Kernel::Kernel(const char *name, Entry entry) : name(name), entry(entry), next(kernels) { kernels = this; }

void *shared(size_t bytes) {
    if (bytes > SHARED_BYTES) give_up("more shared memory than a block may have");
    return block_memory;
}

unsigned barrier(bool yes) {
    running->yes = yes;
    wait(State::at_barrier);
    return barrier_answer;
}

uint64_t exchange(uint64_t value, unsigned mask) {
    const unsigned slot = running->shuffles++ % 2, partner = running_number ^ mask;
    running->brought[slot] = value;
    wait(State::in_warp);
    return fibers[partner]->brought[slot];
}

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    if (exponent == 0) return cast<float>(sign | cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return cast<float>(sign | wide << 23 | fraction << 13);
}

uint16_t float_to_half(float x) {
    const uint32_t bits = cast<uint32_t>(x), sign = bits >> 16 & 0x8000, abs = bits & 0x7fffffff;
    if (abs >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00); // 65536 and more; NaN is the caller's
    if (abs < 0x38800000) {
        // Below 2⁻¹⁴ the steps are 2⁻²⁴: adding 0.5 rounds to them.
        const float shifted = cast<float>(abs) + 0.5f;
        return static_cast<uint16_t>(sign | (cast<uint32_t>(shifted) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (abs - 0x38000000 + 0xfff + (abs >> 13 & 1)) >> 13);
}

} // namespace emulator

// As cuLaunchKernel: `params` points to pointers to the kernel's parameters, of which there is one. Blocks and grids are
// one-dimensional. 0, 1 if there is no such kernel, 2 if the launch could not be.
extern "C" int arc_emulate(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes, void **params,
                           uint64_t seed) {
    using namespace emulator;
    const std::lock_guard<std::mutex> lock(one_grid);
    const Kernel *kernel = kernels;
    while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (!kernel) return 1;
    const bool flat = grid[1] == 1 && grid[2] == 1 && block[1] == 1 && block[2] == 1;
    if (!flat || grid[0] == 0 || block[0] == 0 || block[0] > 1024 || block[0] % WARP != 0 || shared_bytes != 0) return 2;
    entry = kernel->entry;
    arguments = params[0];
    make_fibers(block[0]);
    Random random{seed};
    for (unsigned number : shuffled(grid[0], random, seed != 0)) {
        block_index = {number, 0, 0};
        run_block(block[0], shuffled(block[0] / WARP, random, seed != 0), shuffled(WARP, random, seed != 0));
    }
    return 0;
}
