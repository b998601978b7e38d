// Runs the kernels' own device code on the CPU: every CUDA thread of a block is a fiber, and whatever the threads do
// together (barriers, shuffles, ldmatrix, mma, asynchronous copies) waits for its partners as the hardware would.
//
// It is built to find mistakes rather than to be fast:
//  - a warp runs on until it needs another one, in an order chosen by the schedule, so a missing barrier shows as wrong
//  numbers;
//  - shared memory starts as NaN and has guard bytes behind it;
//  - asynchronous copies land as late as their wait allows (or at once, in other schedules);
//  - what the matrix units and the copy engine read must have been fenced by the threads that wrote it;
//  - a barrier that some threads never reach ends with an error, not a hang.
// The CTAs of a cluster run together: `ranks` blocks of threads, one after the other among the fibers, with as many
// shared memories.
// mma adds exact products in double and rounds once to fp32.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define MXC_DEVICE inline

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mxc {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

namespace emu {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 1024;

struct Copy {
    void* shared;
    const void* global;
    bool valid;
    void run() const;
};

struct Fiber {
    enum State { kReady, kBarrier, kWarp, kPoll, kDone };
    ucontext_t context;
    jmp_buf jump;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool started = false;
    State state = kReady;
    int barrier = 0;
    std::function<bool()> poll;
    std::vector<std::vector<Copy>> copies{1};      // groups of asynchronous copies, the open one last
    std::vector<uint32_t> unfenced;                // 16-byte pieces of shared memory it wrote since its last fence
    std::vector<std::function<void()>> stores[2];  // bulk stores whose source has not been read: open, committed
};

struct Warp {
    const void* kind = nullptr;
    int count = 0;
    void* args[32];
};

struct BoxCopy {  // of the copy engine, on its way
    std::function<void()> land;
    const void* barrier;
};

class Block {
  public:
    std::vector<BoxCopy> box_copies;
    int schedule = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    char* shared = nullptr;  // of rank 0; the others' follow
    size_t shared_bytes = 0, shared_stride = 0;
    int ranks = 1, rank_threads = 0;
    unsigned first_index = 0;        // of the rank 0 block in the grid
    std::vector<uint16_t> unfenced;  // for each 16-byte piece 1 + the thread that wrote it and has not fenced
    std::function<void()> body;
    int current = -1;
    int generation = 0;  // counts the blocks run
    std::string error;
    jmp_buf scheduler;

    // Copies early and products late (1) is the schedule in which a buffer that is refilled too early shows.
    bool lateCopies() const { return (schedule & 1) == 0; }
    bool lateProducts() const { return schedule % 4 != 3; }

    int rank() const { return current / rank_threads; }
    char* rankMemory(int rank) const { return shared + static_cast<size_t>(rank) * shared_stride; }
    char* memory() const { return rankMemory(rank()); }
    // A CTA's shared memory is gone when its last thread has ended.
    char* remoteMemory(int rank) {
        bool ended = true;
        for (int thread = rank * rank_threads; thread < (rank + 1) * rank_threads; ++thread)
            ended = ended && fibers[thread].state == Fiber::kDone;
        if (ended) abandon("access to the shared memory of a CTA that has ended");
        return rankMemory(rank);
    }

    // Ordinary writes to shared memory, and their fence.
    void wrote(const char* to, size_t bytes) {
        const size_t first = static_cast<size_t>(to - shared) / 16,
                     end = (static_cast<size_t>(to - shared) + bytes + 15) / 16;
        for (size_t piece = first; piece < end; ++piece) {
            if (unfenced[piece] == current + 1) continue;
            unfenced[piece] = static_cast<uint16_t>(current + 1);
            fibers[current].unfenced.push_back(static_cast<uint32_t>(piece));
        }
    }
    void fence() {
        for (uint32_t piece : fibers[current].unfenced) {
            if (unfenced[piece] == current + 1) unfenced[piece] = 0;
        }
        fibers[current].unfenced.clear();
    }
    void readAsync(const char* from) {
        if (unfenced[static_cast<size_t>(from - shared) / 16] != 0)
            abandon("the matrix units or the copy engine read what was written without a fence");
    }

    void yield() {
        Fiber& fiber = fibers[current];
        if (!_setjmp(fiber.jump)) _longjmp(scheduler, 1);
    }
    [[noreturn]] void abandon(const std::string& what) {
        error = what;
        _longjmp(scheduler, 1);
        __builtin_unreachable();
    }

    void run(int threads) {
        rank_threads = threads;
        threads *= ranks;
        fibers.clear();
        fibers.resize(threads);
        warps.assign((threads + 31) / 32, Warp());
        unfenced.assign(shared_stride * static_cast<size_t>(ranks) / 16, 0);
        error.clear();
        uint32_t random = 12345u + static_cast<uint32_t>(schedule);
        std::vector<int> order(warps.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
        for (;;) {
            if ((schedule >> 1) % 3 == 1) {
                for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(order.size() - 1 - i);
            } else if ((schedule >> 1) % 3 == 2) {
                for (size_t i = order.size(); i > 1; --i) {
                    random = random * 1664525u + 1013904223u;
                    std::swap(order[i - 1], order[(random >> 8) % i]);
                }
            }
            bool progress = false;
            for (int warp : order) {
                bool again = true;
                while (again) {
                    again = false;
                    for (int thread = warp * 32; thread < warp * 32 + 32 && thread < threads; ++thread) {
                        Fiber& fiber = fibers[thread];
                        if (fiber.state == Fiber::kPoll && fiber.poll()) fiber.state = Fiber::kReady;
                        if (fiber.state != Fiber::kReady) continue;
                        resume(thread);
                        if (!error.empty()) throw std::runtime_error(error);
                        again = progress = true;
                    }
                }
            }
            if (progress) continue;
            bool done = true;
            for (Fiber& fiber : fibers) done = done && fiber.state == Fiber::kDone;
            if (done && !box_copies.empty()) throw std::runtime_error("a block ends with copies nobody waited for");
            if (done) return;
            throw std::runtime_error(describeDeadlock());
        }
    }

    // Barrier `id` (0..15) of `count` threads of this CTA (0: all of them); 16: of the cluster.
    void barrier(int id, int count, bool wait) {
        if (count == 0) count = id == kClusterBarrier ? static_cast<int>(fibers.size()) : rank_threads;
        if (id != kClusterBarrier) id += rank() * (kClusterBarrier + 1);
        if (static_cast<size_t>(id) >= arrived_.size()) arrived_.resize(id + 1, 0);
        ++arrived_[id];
        if (arrived_[id] == count) {
            arrived_[id] = 0;
            for (Fiber& fiber : fibers) {
                if (fiber.state == Fiber::kBarrier && fiber.barrier == id) fiber.state = Fiber::kReady;
            }
            return;
        }
        if (!wait) return;
        fibers[current].state = Fiber::kBarrier;
        fibers[current].barrier = id;
        yield();
    }

    template <class Args, class Function>
    void warpCollective(const void* kind, Args& args, Function&& function) {
        Warp& warp = warps[current / 32];
        if (warp.count != 0 && warp.kind != kind) abandon("the lanes of a warp meet in different operations");
        warp.kind = kind;
        warp.args[current % 32] = &args;
        if (++warp.count == 32) {
            Args* all[32];
            for (int lane = 0; lane < 32; ++lane) all[lane] = static_cast<Args*>(warp.args[lane]);
            function(all);
            warp.count = 0;
            for (int lane = 0; lane < 32; ++lane) {
                Fiber& fiber = fibers[current / 32 * 32 + lane];
                if (fiber.state == Fiber::kWarp) fiber.state = Fiber::kReady;
            }
            return;
        }
        fibers[current].state = Fiber::kWarp;
        yield();
    }

    void waitUntil(std::function<bool()> condition) {
        if (condition()) return;
        fibers[current].poll = std::move(condition);
        fibers[current].state = Fiber::kPoll;
        yield();
    }

    static constexpr int kClusterBarrier = 16;

    void reset() {
        arrived_.clear();
        box_copies.clear();
        ++generation;
    }

  private:
    static void entry();
    void resume(int thread);
    std::string describeDeadlock() const {
        int waiting[5] = {};
        for (const Fiber& fiber : fibers) ++waiting[fiber.state];
        char text[160];
        snprintf(text, sizeof text, "deadlock: %d threads at a barrier, %d at a warp operation, %d polling, %d done",
                 waiting[1], waiting[2], waiting[3], waiting[4]);
        return text;
    }
    std::vector<int> arrived_;
};

inline Block block;

inline void Block::entry() {
    block.body();
    Fiber& fiber = block.fibers[block.current];
    for (auto& group : fiber.copies) {
        if (!group.empty()) block.abandon("a thread ends with copies it never waited for");
    }
    if (!fiber.stores[0].empty() || !fiber.stores[1].empty())
        block.abandon("a thread ends with bulk stores it never waited for");
    fiber.state = Fiber::kDone;
    _longjmp(block.scheduler, 1);
}

inline void Block::resume(int thread) {
    current = thread;
    threadIdx.x = static_cast<unsigned>(thread % rank_threads);
    blockIdx.x = first_index + static_cast<unsigned>(rank());
    if (_setjmp(scheduler)) return;
    Fiber& fiber = fibers[thread];
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::entry, 0);
    setcontext(&fiber.context);
}

inline void Copy::run() const {
    if (valid) {
        memcpy(shared, global, 16);
    } else {
        memset(shared, 0, 16);
    }
    block.wrote(static_cast<const char*>(shared), 16);
}

template <class Kernel, class = void>
struct ClusterOf {
    static constexpr int value = 1;
};
template <class Kernel>
struct ClusterOf<Kernel, decltype(static_cast<void>(Kernel::kCluster))> {
    static constexpr int value = Kernel::kCluster;
};

// Runs Kernel::run(args, shared) for every block of the grid.
template <class Kernel>
void launch(unsigned grid, const typename Kernel::Args& args, int schedule) {
    const size_t bytes = Kernel::kSharedBytes;
    const size_t stride = (bytes + kGuardBytes + 1023) / 1024 * 1024;
    block.schedule = schedule;
    block.ranks = ClusterOf<Kernel>::value;
    block.shared_bytes = bytes;
    block.shared_stride = stride;
    const size_t total = stride * static_cast<size_t>(block.ranks);
    std::unique_ptr<char, decltype(&free)> shared(static_cast<char*>(aligned_alloc(1024, total)), &free);
    block.shared = shared.get();
    gridDim = {grid, 1, 1};
    blockDim = {static_cast<unsigned>(Kernel::kThreads), 1, 1};
    block.body = [&] { Kernel::run(args, block.memory()); };
    if (grid % static_cast<unsigned>(block.ranks) != 0) throw std::runtime_error("a grid of broken clusters");
    for (unsigned index = 0; index < grid; index += static_cast<unsigned>(block.ranks)) {
        block.first_index = index;
        memset(shared.get(), 0xff, total);
        block.reset();
        block.run(Kernel::kThreads);
        for (size_t i = 0; i < total; ++i) {
            if (i % stride < bytes) i += bytes - i % stride;
            if (static_cast<unsigned char>(shared.get()[i]) != 0xff)
                throw std::runtime_error("write past the shared memory");
        }
    }
}

inline float toFloat(uint32_t bits) {
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline uint32_t toBits(float value) {
    uint32_t out;
    memcpy(&out, &value, 4);
    return out;
}
inline float decode(BFloat16 value) { return toFloat(static_cast<uint32_t>(value.bits) << 16); }
inline float decode(Half value) {
    _Float16 half;
    memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
}
inline uint16_t encode(BFloat16*, float value) {
    const uint32_t bits = toBits(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t encode(Half*, float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t out;
    memcpy(&out, &half, 2);
    return out;
}
template <class Element>
float element(uint32_t pair, int index) {
    return decode(Element{static_cast<uint16_t>(index ? pair >> 16 : pair & 0xffffu)});
}

// The memory behind a 32-bit shared address (an offset from the block's shared memory), checked.
inline char* sharedMemory(uint32_t address, size_t bytes) {
    if (address + bytes > block.shared_bytes) block.abandon("shared access out of range");
    if (address % bytes != 0) block.abandon("misaligned shared access");
    return block.memory() + address;
}
inline void store(uint32_t address, const void* value, size_t bytes) {
    char* to = sharedMemory(address, bytes);
    memcpy(to, value, bytes);
    block.wrote(to, bytes);
}

}  // namespace emu

inline void syncBlock() { emu::block.barrier(0, 0, true); }
template <class Function>
float shuffleBy(float value, Function source, const void* kind) {
    struct Args {
        float value, out;
    } args{value, 0};
    emu::block.warpCollective(kind, args, [&](Args** all) {
        for (int lane = 0; lane < 32; ++lane) all[lane]->out = all[source(lane)]->value;
    });
    return args.out;
}
inline float shuffleUp(float value, int delta) {
    static const char kind = 0;
    return shuffleBy(value, [delta](int lane) { return lane >= delta ? lane - delta : lane; }, &kind);
}
inline float shuffle(float value, int from) {
    static const char kind = 0;
    return shuffleBy(value, [from](int) { return from; }, &kind);
}

inline uint32_t sharedAddress(const void* shared) {
    return static_cast<uint32_t>(static_cast<const char*>(shared) - emu::block.memory());
}
inline void storeShared32(uint32_t address, uint32_t value) { emu::store(address, &value, 4); }

inline void copyAsync16(uint32_t address, const void* global, bool valid) {
    char* shared = emu::sharedMemory(address, 16);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) emu::block.abandon("misaligned global copy");
    const emu::Copy copy{shared, global, valid};
    if (!emu::block.lateCopies()) copy.run();
    emu::block.fibers[emu::block.current].copies.back().push_back(copy);
}
inline void copyAsyncCommit() { emu::block.fibers[emu::block.current].copies.emplace_back(); }
template <int kPending>
void copyAsyncWait() {
    auto& groups = emu::block.fibers[emu::block.current].copies;
    while (static_cast<int>(groups.size()) - 1 > kPending) {
        if (emu::block.lateCopies()) {
            for (const emu::Copy& copy : groups.front()) copy.run();
        }
        groups.erase(groups.begin());
    }
}

namespace emu {
struct MatrixArgs {
    uint32_t* out;
    const void* row;
};
inline uint16_t matrixElement(MatrixArgs** all, int tile, int row, int column) {
    return static_cast<const uint16_t*>(all[tile * 8 + row]->row)[column];
}
}  // namespace emu

inline void loadMatrix4(uint32_t (&out)[4], uint32_t row) {
    static const char kind = 0;
    emu::MatrixArgs args{out, emu::sharedMemory(row, 16)};
    emu::block.warpCollective(&kind, args, [](emu::MatrixArgs** all) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int tile = 0; tile < 4; ++tile) {
                const uint32_t low = emu::matrixElement(all, tile, lane / 4, 2 * (lane % 4));
                const uint32_t high = emu::matrixElement(all, tile, lane / 4, 2 * (lane % 4) + 1);
                all[lane]->out[tile] = low | high << 16;
            }
        }
    });
}
inline void loadMatrix4Transposed(uint32_t (&out)[4], uint32_t row) {
    static const char kind = 0;
    emu::MatrixArgs args{out, emu::sharedMemory(row, 16)};
    emu::block.warpCollective(&kind, args, [](emu::MatrixArgs** all) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int tile = 0; tile < 4; ++tile) {
                const uint32_t low = emu::matrixElement(all, tile, 2 * (lane % 4), lane / 4);
                const uint32_t high = emu::matrixElement(all, tile, 2 * (lane % 4) + 1, lane / 4);
                all[lane]->out[tile] = low | high << 16;
            }
        }
    });
}
inline uint32_t shuffleXor(uint32_t value, int mask) {
    static const char kind = 0;
    struct Args {
        uint32_t value, out;
    } args{value, 0};
    emu::block.warpCollective(&kind, args, [mask](Args** all) {
        for (int lane = 0; lane < 32; ++lane) all[lane]->out = all[lane ^ mask]->value;
    });
    return args.out;
}
inline uint32_t transposeMatrix(uint32_t value) {
    static const char kind = 0;
    struct Args {
        uint32_t value, out;
    } args{value, 0};
    emu::block.warpCollective(&kind, args, [](Args** all) {
        for (int lane = 0; lane < 32; ++lane) {
            uint32_t out = 0;
            for (int half = 0; half < 2; ++half) {
                const int row = 2 * (lane % 4) + half, column = lane / 4;
                const uint32_t pair = all[row * 4 + column / 2]->value;
                out |= (column % 2 ? pair >> 16 : pair & 0xffffu) << (16 * half);
            }
            all[lane]->out = out;
        }
    });
    return args.out;
}

template <class Element>
void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static const char kind = 0;
    struct Args {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } args{d, a, {b0, b1}};
    emu::block.warpCollective(&kind, args, [](Args** all) {
        float A[16][16], B[8][16];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int half = 0; half < 2; ++half) {
                for (int reg = 0; reg < 4; ++reg) {
                    A[g + 8 * (reg % 2)][2 * t + half + 8 * (reg / 2)] = emu::element<Element>(all[lane]->a[reg], half);
                }
                for (int reg = 0; reg < 2; ++reg)
                    B[g][2 * t + half + 8 * reg] = emu::element<Element>(all[lane]->b[reg], half);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double sum = all[lane]->d[i];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[row][k]) * B[column][k];
                all[lane]->d[i] = static_cast<float>(sum);
            }
        }
    });
}

template <class Element>
uint32_t pack(float low, float high) {
    return emu::encode(static_cast<Element*>(nullptr), low) |
           static_cast<uint32_t>(emu::encode(static_cast<Element*>(nullptr), high)) << 16;
}
template <class Element>
float unpackLow(uint32_t pair) {
    return emu::element<Element>(pair, 0);
}
template <class Element>
float unpackHigh(uint32_t pair) {
    return emu::element<Element>(pair, 1);
}
inline float4 loadStreaming(const float4* global) { return *global; }
inline void storeStreaming(float4* global, float4 value) { *global = value; }

}  // namespace mxc
