// The sm_90a part of the emulator: mbarriers, named barriers, warpgroup products read through their descriptors.
//
// Products run as late as their wait allows (in even schedules; at once in odd ones), so an operand overwritten too
// early or a result used before its wait gives wrong numbers.
#pragma once

#include "mxc_emulator.h"

namespace mxc {
namespace emu {

struct Mbarrier {  // what a barrier's 8 bytes hold here
    uint16_t count, pending : 15, phase : 1;
    int32_t bytes;  // expected and not yet copied; less than 0 where a copy came before its announcement

    void settle() {
        if (pending != 0 || bytes != 0) return;
        pending = count;
        phase ^= 1;
    }
};
static_assert(sizeof(Mbarrier) == 8, "a barrier is 8 bytes");

struct WgmmaArgs {
    float* d;
    uint32_t a[4];
    bool a_shared;
    uint64_t a_descriptor, b_descriptor;
    bool keep, a_transposed, transposed;
    int columns;
};

struct WgmmaOp {
    WgmmaArgs args[128];
    int arrived = 0;
    bool done = false;
    void (*run)(WgmmaOp&) = nullptr;
};

struct WgmmaGroup {  // of one warpgroup
    std::vector<std::unique_ptr<WgmmaOp>> ops;
    size_t issued[128] = {};
    std::vector<size_t> commits[128];
};

inline std::vector<WgmmaGroup>& wgmmaGroups() {
    static std::vector<WgmmaGroup> groups;
    static int owner = -1;
    if (owner != block.generation) {
        owner = block.generation;
        groups.clear();
        groups.resize((block.fibers.size() + 127) / 128);
    }
    return groups;
}

inline uint32_t descriptorAddress(uint64_t descriptor, int row, int column_bytes) {
    if ((descriptor >> 62) != 1 || ((descriptor >> 49) & 7) != 0) block.abandon("not a 128-byte swizzle descriptor");
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t leading = static_cast<uint32_t>((descriptor >> 16) & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>((descriptor >> 32) & 0x3fff) << 4;
    const uint32_t address = start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128 +
                             static_cast<uint32_t>(column_bytes / 128) * leading +
                             static_cast<uint32_t>(column_bytes % 128);
    return address ^ (((address >> 7) & 7) << 4);
}
template <class Element>
float descriptorElement(uint64_t descriptor, int row, int column) {
    Element element;
    memcpy(&element, sharedMemory(descriptorAddress(descriptor, row, 2 * column), 2), 2);
    return decode(element);
}

template <class Element>
void runWgmma(WgmmaOp& op) {
    const WgmmaArgs& first = op.args[0];
    std::vector<float> b(static_cast<size_t>(first.columns) * 16);
    for (int n = 0; n < first.columns; ++n) {
        for (int k = 0; k < 16; ++k) {
            b[static_cast<size_t>(n) * 16 + k] = first.transposed
                                                     ? descriptorElement<Element>(first.b_descriptor, k, n)
                                                     : descriptorElement<Element>(first.b_descriptor, n, k);
        }
    }
    for (int warp = 0; warp < 4; ++warp) {
        float a[16][16];
        for (int lane = 0; lane < 32; ++lane) {
            const WgmmaArgs& args = op.args[warp * 32 + lane];
            if (args.b_descriptor != first.b_descriptor || args.keep != first.keep)
                block.abandon("a warpgroup's threads disagree");
            for (int reg = 0; reg < 4; ++reg) {
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * (reg % 2), k = 2 * (lane % 4) + half + 8 * (reg / 2);
                    if (!args.a_shared) {
                        a[row][k] = element<Element>(args.a[reg], half);
                    } else {
                        a[row][k] = args.a_transposed
                                        ? descriptorElement<Element>(args.a_descriptor, k, warp * 16 + row)
                                        : descriptorElement<Element>(args.a_descriptor, warp * 16 + row, k);
                    }
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            float* d = op.args[warp * 32 + lane].d;
            for (int i = 0; i < first.columns / 2; ++i) {
                const int row = lane / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
                double sum = first.keep ? d[i] : 0.0;
                for (int k = 0; k < 16; ++k)
                    sum += static_cast<double>(a[row][k]) * b[static_cast<size_t>(column) * 16 + k];
                d[i] = static_cast<float>(sum);
            }
        }
    }
}

// The pieces of an operand tile of `size` rows or columns and 16 k.
inline void readTile(uint64_t descriptor, bool transposed, int size) {
    const int rows = transposed ? 16 : size, pieces = transposed ? size / 8 : 2;
    for (int row = 0; row < rows; ++row) {
        for (int piece = 0; piece < pieces; ++piece)
            block.readAsync(sharedMemory(descriptorAddress(descriptor, row, 16 * piece), 16));
    }
}

template <class Element>
void issueWgmma(const WgmmaArgs& args) {
    WgmmaGroup& group = wgmmaGroups()[static_cast<size_t>(block.current / 128)];
    const int thread = block.current % 128;
    const size_t index = group.issued[thread]++;
    if (index == group.ops.size()) group.ops.push_back(std::make_unique<WgmmaOp>());
    WgmmaOp& op = *group.ops[index];
    op.args[thread] = args;
    op.run = &runWgmma<Element>;
    if (++op.arrived != 128) return;
    readTile(args.b_descriptor, args.transposed, args.columns);
    if (args.a_shared) readTile(args.a_descriptor, args.a_transposed, 64);
    if (!block.lateProducts()) {
        op.run(op);
        op.done = true;
    }
}

}  // namespace emu

inline emu::Mbarrier& mbarrier(uint32_t barrier) {
    return *reinterpret_cast<emu::Mbarrier*>(emu::sharedMemory(barrier, 8));
}
inline void barrierInit(uint32_t barrier, int arrivals) {
    if (arrivals <= 0 || arrivals > 0x7fff) emu::block.abandon("a barrier of no arrivals");
    emu::Mbarrier state;
    state.count = static_cast<uint16_t>(arrivals);
    state.pending = static_cast<uint16_t>(arrivals) & 0x7fffu;
    state.phase = 0;
    state.bytes = 0;
    mbarrier(barrier) = state;
}
inline void barrierInitFence() {}
inline void barrierArrive(emu::Mbarrier& state) {
    if (state.pending == 0) emu::block.abandon("more arrivals than a barrier expects");
    --state.pending;
    state.settle();
}
inline void barrierArrive(uint32_t barrier) { barrierArrive(mbarrier(barrier)); }
inline void barrierWait(uint32_t barrier, int parity) {
    emu::block.waitUntil([pointer = &mbarrier(barrier), parity] {
        emu::Mbarrier& state = *pointer;
        // Copies land as late as they can: when someone waits and nothing else is missing.
        auto& copies = emu::block.box_copies;
        for (size_t i = 0; i < copies.size() && state.phase == parity && state.pending == 0;) {
            if (copies[i].barrier != &state) {
                ++i;
                continue;
            }
            const auto land = copies[i].land;
            copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
            land();
        }
        return state.phase != parity;
    });
}
inline void syncThreads(int id, int threads) { emu::block.barrier(id, threads, true); }
inline void syncWarp() {
    static const char kind = 0;
    int nothing = 0;
    emu::block.warpCollective(&kind, nothing, [](int**) {});
}
inline void fenceAsyncShared() { emu::block.fence(); }

namespace emu {
template <bool kTransposed>
void storeMatrix(uint32_t row, const uint32_t (&registers)[4]) {
    static const char kind = 0;
    struct Args {
        uint32_t row;
        const uint32_t* registers;
    } args{row, registers};
    block.warpCollective(&kind, args, [](Args** all) {
        for (int tile = 0; tile < 4; ++tile) {
            for (int r = 0; r < 8; ++r) {
                uint16_t out[8];
                for (int c = 0; c < 8; ++c) {
                    const int row = kTransposed ? c : r, column = kTransposed ? r : c;
                    out[c] = static_cast<uint16_t>(all[row * 4 + column / 2]->registers[tile] >> (16 * (column % 2)));
                }
                const int lane = tile * 8 + r, last = block.current;
                block.current = last / 32 * 32 + lane;  // the lane that names the row writes it
                store(all[lane]->row, out, 16);
                block.current = last;
            }
        }
    });
}
}  // namespace emu
inline void storeMatrix4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    emu::storeMatrix<false>(row, {r0, r1, r2, r3});
}
inline void storeMatrix4Transposed(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    emu::storeMatrix<true>(row, {r0, r1, r2, r3});
}
inline float loadSharedFloat(uint32_t address) {
    float out;
    memcpy(&out, emu::sharedMemory(address, 4), 4);
    return out;
}
inline float2 loadSharedFloat2(uint32_t address) {
    float2 out;
    memcpy(&out, emu::sharedMemory(address, 8), 8);
    return out;
}
inline uint4 loadShared128(uint32_t address) {
    uint4 out;
    memcpy(&out, emu::sharedMemory(address, 16), 16);
    return out;
}
inline void storeShared128(uint32_t address, uint4 value) { emu::store(address, &value, 16); }
inline void wgmmaFence() {}
inline void wgmmaCommit() {
    emu::WgmmaGroup& group = emu::wgmmaGroups()[static_cast<size_t>(emu::block.current / 128)];
    const int thread = emu::block.current % 128;
    group.commits[thread].push_back(group.issued[thread]);
}
template <int kPending>
void wgmmaWait() {
    emu::WgmmaGroup& group = emu::wgmmaGroups()[static_cast<size_t>(emu::block.current / 128)];
    const auto& commits = group.commits[emu::block.current % 128];
    if (commits.size() <= kPending) return;
    const size_t end = commits[commits.size() - 1 - kPending];
    if (end == 0) return;
    emu::block.waitUntil([&group, end] { return group.ops[end - 1]->arrived == 128; });
    for (size_t i = 0; i < end; ++i) {
        emu::WgmmaOp& op = *group.ops[i];
        if (!op.done) {
            op.run(op);
            op.done = true;
        }
    }
}
template <int kTiles>
void pinRegisters(float (&)[kTiles][4]) {}

inline void pinRegister(int&) {}

template <class Element, int kColumns>
struct Wgmma {
    template <int kTransposedA, int kTransposedB, bool kKeep>
    static void fromShared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b) {
        emu::issueWgmma<Element>({&d[0][0], {}, true, a, b, kKeep, kTransposedA != 0, kTransposedB != 0, kColumns});
    }
    template <int kTransposedB, bool kKeep>
    static void fromRegisters(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
        emu::issueWgmma<Element>(
            {&d[0][0], {a[0], a[1], a[2], a[3]}, false, 0, b, kKeep, false, kTransposedB != 0, kColumns});
    }
};

}  // namespace mxc
