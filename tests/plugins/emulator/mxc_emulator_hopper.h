// The sm_90a part of the emulator: mbarriers, named barriers, warpgroup products read through their descriptors.
//
// Products run as late as their wait allows (in even schedules; at once in odd ones), so an operand overwritten too
// early or a result used before its wait gives wrong numbers.
#pragma once

#include "mxc_emulator.h"

namespace mxc {
namespace emu {

struct Mbarrier {  // what a barrier's 8 bytes hold here
    uint16_t count, pending;
    uint32_t phase;
};
static_assert(sizeof(Mbarrier) == 8, "a barrier is 8 bytes");

struct WgmmaArgs {
    float* d;
    uint32_t a[4];
    bool a_shared;
    uint64_t a_descriptor, b_descriptor;
    bool keep, transposed;
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
    const uint32_t stride = static_cast<uint32_t>((descriptor >> 32) & 0x3fff) << 4;
    const uint32_t address = start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128 +
                             static_cast<uint32_t>(column_bytes);
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
                    a[row][k] = args.a_shared ? descriptorElement<Element>(args.a_descriptor, warp * 16 + row, k)
                                              : element<Element>(args.a[reg], half);
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

template <class Element>
void issueWgmma(const WgmmaArgs& args) {
    WgmmaGroup& group = wgmmaGroups()[static_cast<size_t>(block.current / 128)];
    const int thread = block.current % 128;
    const size_t index = group.issued[thread]++;
    if (index == group.ops.size()) group.ops.push_back(std::make_unique<WgmmaOp>());
    WgmmaOp& op = *group.ops[index];
    op.args[thread] = args;
    op.run = &runWgmma<Element>;
    if (++op.arrived == 128 && !block.lateCopies()) {
        op.run(op);
        op.done = true;
    }
}

}  // namespace emu

inline emu::Mbarrier& mbarrier(uint64_t* barrier) { return *reinterpret_cast<emu::Mbarrier*>(barrier); }
inline void barrierInit(uint64_t* barrier, int arrivals) {
    mbarrier(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrierInitFence() {}
inline void barrierArrive(uint64_t* barrier) {
    emu::Mbarrier& state = mbarrier(barrier);
    if (state.pending == 0) emu::block.abandon("more arrivals than a barrier expects");
    if (--state.pending == 0) {
        state.pending = state.count;
        ++state.phase;
    }
}
inline void barrierWait(uint64_t* barrier, int parity) {
    emu::block.waitUntil([barrier, parity] { return (mbarrier(barrier).phase & 1u) != static_cast<uint32_t>(parity); });
}
inline void syncThreads(int id, int threads) { emu::block.barrier(id, threads, true); }
inline void syncWarp() {
    static const char kind = 0;
    int nothing = 0;
    emu::block.warpCollective(&kind, nothing, [](int**) {});
}
inline void fenceAsyncShared() {}
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
    template <int kTransposed>
    static void fromShared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, int keep) {
        emu::issueWgmma<Element>({&d[0][0], {}, true, a, b, keep != 0, kTransposed != 0, kColumns});
    }
    template <int kTransposed>
    static void fromRegisters(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
        emu::issueWgmma<Element>(
            {&d[0][0], {a[0], a[1], a[2], a[3]}, false, 0, b, keep != 0, kTransposed != 0, kColumns});
    }
};

}  // namespace mxc
