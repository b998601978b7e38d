// The emulator's side of mxc/tma.cuh: boxes of tensors, clusters, bulk stores.
//
// A box lands when someone waits for its barrier and nothing else is missing there (in even schedules; at once in odd
// ones). A stored box is read from shared memory when its thread waits for that (or at once). Nothing outside the
// tensor is read (zeros) or written.
#pragma once

#include "mxc_emulator_hopper.h"

namespace mxc {

struct alignas(128) TensorMap {  // as cuTensorMapEncodeTiled takes them; 16-bit elements, 128-byte swizzle
    char* base;
    int64_t size[4];
    int64_t stride[4];  // in bytes; of the first dimension 2
    int box[4];
};

namespace emu {

// Calls function(offset in the swizzled box, global address or null) for its 16-byte pieces.
template <class Function>
void forBox(const TensorMap& map, const int (&at)[4], Function&& function) {
    for (int i = 0; i < map.box[1] * map.box[2] * map.box[3]; ++i) {
        const int64_t index[3] = {at[1] + i % map.box[1], at[2] + i / map.box[1] % map.box[2],
                                  at[3] + i / map.box[1] / map.box[2]};
        bool inside = true;
        char* row = map.base;
        for (int d = 0; d < 3; ++d) {
            inside = inside && index[d] >= 0 && index[d] < map.size[d + 1];
            row += index[d] * map.stride[d + 1];
        }
        for (int piece = 0; piece < map.box[0] / 8; ++piece) {
            const int64_t column = at[0] + piece * 8;
            const bool there = inside && column >= 0 && column + 8 <= map.size[0];
            function(swizzledOffset(i, piece), there ? row + 2 * column : nullptr);
        }
    }
}

inline void startBox(uint32_t to, const TensorMap& map, uint32_t barrier, unsigned ranks, const int (&at)[4]) {
    if (to % 1024 != 0) block.abandon("a swizzled box starts at a multiple of 1024 bytes");
    for (int rank = 0; rank < block.ranks; ++rank) {
        if ((ranks >> rank & 1u) == 0) continue;
        auto* counted = reinterpret_cast<Mbarrier*>(block.remoteMemory(rank) + barrier);
        char* shared = block.rankMemory(rank) + to;
        const TensorMap copied = map;
        const int c0 = at[0], c1 = at[1], c2 = at[2], c3 = at[3];
        const auto land = [copied, counted, shared, c0, c1, c2, c3] {
            int32_t bytes = 0;
            forBox(copied, {c0, c1, c2, c3}, [&](uint32_t offset, const char* global) {
                if (global != nullptr) {
                    memcpy(shared + offset, global, 16);
                } else {
                    memset(shared + offset, 0, 16);
                }
                block.unfenced[static_cast<size_t>(shared + offset - block.shared) / 16] = 0;
                bytes += 16;
            });
            counted->bytes -= bytes;
            counted->settle();
        };
        if (block.lateCopies()) {
            block.box_copies.push_back({land, counted});
        } else {
            land();
        }
    }
}

}  // namespace emu

inline void copyBox(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    emu::startBox(to, map, barrier, 1u << emu::block.rank(), {c0, c1, c2, c3});
}
inline void copyBoxMulticast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t ranks, int c0, int c1,
                             int c2, int c3) {
    emu::startBox(to, map, barrier, ranks, {c0, c1, c2, c3});
}
inline void storeBox(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
    if (from % 1024 != 0) emu::block.abandon("a swizzled box starts at a multiple of 1024 bytes");
    const char* shared = emu::block.memory() + from;
    emu::forBox(map, {c0, c1, c2, c3}, [&](uint32_t offset, const char*) { emu::block.readAsync(shared + offset); });
    const TensorMap copied = map;
    emu::block.fibers[emu::block.current].stores[0].push_back([copied, shared, c0, c1, c2, c3] {
        emu::forBox(copied, {c0, c1, c2, c3}, [&](uint32_t offset, char* global) {
            if (global != nullptr) memcpy(global, shared + offset, 16);
        });
    });
}
inline void storeBoxCommit() {
    emu::Fiber& fiber = emu::block.fibers[emu::block.current];
    for (auto& store : fiber.stores[0]) {
        if (!emu::block.lateCopies()) store();
        fiber.stores[1].push_back(std::move(store));
    }
    fiber.stores[0].clear();
}
inline void storeBoxWaitRead() {
    emu::Fiber& fiber = emu::block.fibers[emu::block.current];
    if (emu::block.lateCopies()) {
        for (auto& store : fiber.stores[1]) store();
    }
    fiber.stores[1].clear();
}

inline void barrierExpect(uint32_t barrier, uint32_t bytes) { mbarrier(barrier).bytes += static_cast<int32_t>(bytes); }
inline void barrierArriveAt(uint32_t barrier, int rank) {
    if (rank < 0 || rank >= emu::block.ranks) emu::block.abandon("no such CTA in the cluster");
    barrierArrive(*reinterpret_cast<emu::Mbarrier*>(emu::block.remoteMemory(rank) + barrier));
}
inline void syncCluster() { emu::block.barrier(emu::Block::kClusterBarrier, 0, true); }

inline int warpUniform(int value) {
    static const char kind = 0;
    emu::block.warpCollective(&kind, value, [](int** all) {
        for (int lane = 0; lane < 32; ++lane) {
            if (*all[lane] != *all[0]) emu::block.abandon("a warp's lanes differ in what is to be uniform");
        }
    });
    return value;
}
template <int kCount>
void giveRegistersBack() {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "what setmaxnreg takes");
}
template <int kCount>
void takeRegisters() {
    giveRegistersBack<kCount>();
}

}  // namespace mxc
