// Instructions of sm_90a: warpgroup matrix products, mbarriers, named barriers.
// On the host the emulator (tests/plugins/emulator/mxc_emulator_hopper.h) supplies the same functions.
//
// Operand tiles in shared memory have rows of 64 16-bit elements (128 bytes) and the 128-byte swizzle: the 16-byte
// piece c of row r lies at piece c ^ (r % 8). Each tile starts at a multiple of 1024 bytes.
#pragma once

#include "mxc/device.cuh"

namespace mxc {

constexpr uint32_t kSwizzleRowBytes = 128;
constexpr uint32_t kSwizzleAtomBytes = 1024;  // 8 rows

// Byte offset of 16-byte piece `piece` of row `row` in a swizzled tile.
MXC_DEVICE uint32_t swizzledOffset(int row, int piece) {
    return static_cast<uint32_t>(row) * kSwizzleRowBytes + static_cast<uint32_t>((piece ^ (row & 7)) << 4);
}

// Matrix descriptor of a tile that starts (with the k offset in it) at `address`: 128-byte swizzle, groups of 8 rows
// 1024 bytes apart. One descriptor form serves both directions:
//   rows are the M or N index, k along the row: the next 16 k are 32 bytes further;
//   rows are the k index ("transposed"), M or N along the row: the next 16 k are 2048 bytes further, and columns 64 and
//   up are in a second tile `column_tile_bytes` further.
MXC_DEVICE uint64_t swizzledDescriptor(uint32_t address, uint32_t column_tile_bytes = 16) {
    constexpr uint64_t kStride = kSwizzleAtomBytes >> 4, kLayout128 = 1;
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>(column_tile_bytes >> 4) << 16 |
           kStride << 32 | kLayout128 << 62;
}
// The same `bytes` further (a multiple of 16). Nothing carries out of the address: shared memory ends before 256 KB.
MXC_DEVICE uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace mxc

#if defined(__CUDACC__)

namespace mxc {

// Barriers (8 bytes of shared memory) are named by their addresses.
MXC_DEVICE void barrierInit(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the other threads and the asynchronous units.
MXC_DEVICE void barrierInitFence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
MXC_DEVICE void barrierArrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
MXC_DEVICE bool barrierPassed(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
// Waits until the phase of that parity has completed. Something that never comes (a mistake) ends in an error after ten
// seconds, not in a hang: far beyond any wait of a sound run.
MXC_DEVICE void barrierWait(uint32_t barrier, int parity) {
    if (barrierPassed(barrier, parity)) return;
    uint64_t start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    while (!barrierPassed(barrier, parity)) {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        // A store to address 0, which ends the kernel with an error. __trap() would be a way out of the loop, and then
        // ptxas keeps every warpgroup to the registers it had before setmaxnreg (and spills).
        if (now - start > 10000000000ull) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory");
    }
}
// Waits for `threads` threads (a multiple of 32) that name the barrier `id` (1..15).
MXC_DEVICE void syncThreads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
MXC_DEVICE void syncWarp() { __syncwarp(); }

// Orders this thread's ordinary shared-memory accesses before later ones of the matrix units and the copy engine.
MXC_DEVICE void fenceAsyncShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8x8 tiles of 16-bit elements, the counterpart of loadMatrix4Transposed and of its plain form.
MXC_DEVICE void storeMatrix4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
MXC_DEVICE void storeMatrix4Transposed(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
MXC_DEVICE float loadSharedFloat(uint32_t address) {
    float out;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(out) : "r"(address) : "memory");
    return out;
}
MXC_DEVICE float2 loadSharedFloat2(uint32_t address) {
    float2 out;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "r"(address) : "memory");
    return out;
}
MXC_DEVICE uint4 loadShared128(uint32_t address) {
    uint4 out;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "r"(address)
                 : "memory");
    return out;
}
MXC_DEVICE void storeShared128(uint32_t address, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// Before the first product, and after ordinary code wrote registers of one.
MXC_DEVICE void wgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MXC_DEVICE void wgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
MXC_DEVICE void wgmmaWait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads or writes of the accumulators across (before a product and after its wait).
template <int kTiles>
MXC_DEVICE void pinRegisters(float (&d)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
    }
}

// The same for one integer: nothing computed from it is kept from before.
MXC_DEVICE void pinRegister(int& value) { asm volatile("" : "+r"(value)); }

// D[64, N] = A[64, 16] B[16, N] (+ D where kKeep), fp32 sums, asynchronous. Warp w of the group holds rows
// 16w..16w+15, each 8 columns of D as mma16816 does, A in registers likewise. kTransposedA, kTransposedB: the rows of
// that operand's tile are the k index. Without kKeep D is only written, so its registers are free before.
template <class Element, int kColumns>
struct Wgmma;

#define MXC_TILE(mode, i) mode(d[i][0]), mode(d[i][1]), mode(d[i][2]), mode(d[i][3])
#define MXC_TILES_8(mode, i)                                                                                       \
    MXC_TILE(mode, i), MXC_TILE(mode, i + 1), MXC_TILE(mode, i + 2), MXC_TILE(mode, i + 3), MXC_TILE(mode, i + 4), \
        MXC_TILE(mode, i + 5), MXC_TILE(mode, i + 6), MXC_TILE(mode, i + 7)
#define MXC_KEPT "+f"
#define MXC_FRESH "=f"
#define MXC_REGISTERS_32                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MXC_REGISTERS_64                                                               \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MXC_WGMMA_SHARED(shape, type, list, a, b, keep, ta, tb, ...)                                            \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, " a ", " b ", " keep \
                 ", 1, 1, " ta ", " tb ";"                                                                      \
                 : __VA_ARGS__                                                                                  \
                 : "l"(descriptor_a), "l"(descriptor_b), "n"(kTransposedA), "n"(kTransposedB))
#define MXC_WGMMA(Element, type)                                                                                       \
    template <>                                                                                                        \
    struct Wgmma<Element, 64> {                                                                                        \
        template <int kTransposedA, int kTransposedB, bool kKeep>                                                      \
        static MXC_DEVICE void fromShared(float (&d)[8][4], uint64_t descriptor_a, uint64_t descriptor_b) {            \
            if constexpr (kKeep) {                                                                                     \
                MXC_WGMMA_SHARED("m64n64k16", type, MXC_REGISTERS_32, "%32", "%33", "1", "%34", "%35",                 \
                                 MXC_TILES_8(MXC_KEPT, 0));                                                            \
            } else {                                                                                                   \
                MXC_WGMMA_SHARED("m64n64k16", type, MXC_REGISTERS_32, "%32", "%33", "0", "%34", "%35",                 \
                                 MXC_TILES_8(MXC_FRESH, 0));                                                           \
            }                                                                                                          \
        }                                                                                                              \
        template <int kTransposedB, bool kKeep>                                                                        \
        static MXC_DEVICE void fromRegisters(float (&d)[8][4], const uint32_t (&a)[4], uint64_t descriptor_b) {        \
            if constexpr (kKeep) {                                                                                     \
                asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MXC_REGISTERS_32         \
                             "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"                                             \
                             : MXC_TILES_8(MXC_KEPT, 0)                                                                \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "n"(kTransposedB));      \
            } else {                                                                                                   \
                asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MXC_REGISTERS_32         \
                             "}, {%32, %33, %34, %35}, %36, 0, 1, 1, %37;"                                             \
                             : MXC_TILES_8(MXC_FRESH, 0)                                                               \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "n"(kTransposedB));      \
            }                                                                                                          \
        }                                                                                                              \
    };                                                                                                                 \
    template <>                                                                                                        \
    struct Wgmma<Element, 128> {                                                                                       \
        template <int kTransposedA, int kTransposedB, bool kKeep>                                                      \
        static MXC_DEVICE void fromShared(float (&d)[16][4], uint64_t descriptor_a, uint64_t descriptor_b) {           \
            if constexpr (kKeep) {                                                                                     \
                MXC_WGMMA_SHARED("m64n128k16", type, MXC_REGISTERS_32 ", " MXC_REGISTERS_64, "%64", "%65", "1", "%66", \
                                 "%67", MXC_TILES_8(MXC_KEPT, 0), MXC_TILES_8(MXC_KEPT, 8));                           \
            } else {                                                                                                   \
                MXC_WGMMA_SHARED("m64n128k16", type, MXC_REGISTERS_32 ", " MXC_REGISTERS_64, "%64", "%65", "0", "%66", \
                                 "%67", MXC_TILES_8(MXC_FRESH, 0), MXC_TILES_8(MXC_FRESH, 8));                         \
            }                                                                                                          \
        }                                                                                                              \
    };
MXC_WGMMA(BFloat16, "bf16")
MXC_WGMMA(Half, "f16")
#undef MXC_WGMMA
#undef MXC_WGMMA_SHARED
#undef MXC_REGISTERS_64
#undef MXC_REGISTERS_32
#undef MXC_FRESH
#undef MXC_KEPT
#undef MXC_TILES_8
#undef MXC_TILE

}  // namespace mxc

#else
#include "mxc_emulator_hopper.h"
#endif
