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
//   rows are the k index ("transposed"), M or N along the row (at most 64): the next 16 k are 2048 bytes further.
MXC_DEVICE uint64_t swizzledDescriptor(uint32_t address) {
    constexpr uint64_t kLeading = 1, kStride = kSwizzleAtomBytes >> 4, kLayout128 = 1;
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | kLeading << 16 | kStride << 32 | kLayout128 << 62;
}

}  // namespace mxc

#if defined(__CUDACC__)

namespace mxc {

MXC_DEVICE void barrierInit(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the other threads and the asynchronous units.
MXC_DEVICE void barrierInitFence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
MXC_DEVICE void barrierArrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory");
}
// Waits until the phase of that parity has completed. Something that never comes (a mistake) ends in an error, not in a
// hang: each try may sleep for about a millisecond at most, so the limit is far beyond any wait of a sound run.
MXC_DEVICE void barrierWait(uint64_t* barrier, int parity) {
    const uint32_t address = sharedAddress(barrier);
    for (uint32_t tries = 0;; ++tries) {
        uint32_t done;
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
        if (done) return;
        if (tries > (1u << 24)) __trap();
    }
}
// Waits for `threads` threads (a multiple of 32) that name the barrier `id` (1..15).
MXC_DEVICE void syncThreads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
MXC_DEVICE void syncWarp() { __syncwarp(); }

// Orders this thread's ordinary shared-memory writes before later reads of the matrix units.
MXC_DEVICE void fenceAsyncShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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

// D[64, N] = A[64, 16] B[16, N] (+ D where keep != 0), fp32 sums, asynchronous. Warp w of the group holds rows
// 16w..16w+15, each 8 columns of D as mma16816 does, A in registers likewise. kTransposed: B's rows are the k index.
template <class Element, int kColumns>
struct Wgmma;
template <>
struct Wgmma<BFloat16, 32> {
    template <int kTransposed>
    static MXC_DEVICE void fromShared(float (&d)[4][4], uint64_t a, uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %18, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "%16, %17, p, 1, 1, 0, %19;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3])
            : "l"(a), "l"(b), "r"(keep), "n"(kTransposed));
    }
    template <int kTransposed>
    static MXC_DEVICE void fromRegisters(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %21, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, p, 1, 1, %22;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(kTransposed));
    }
};
template <>
struct Wgmma<BFloat16, 64> {
    template <int kTransposed>
    static MXC_DEVICE void fromShared(float (&d)[8][4], uint64_t a, uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %34, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, %35;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
              "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
              "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
            : "l"(a), "l"(b), "r"(keep), "n"(kTransposed));
    }
    template <int kTransposed>
    static MXC_DEVICE void fromRegisters(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
              "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
              "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(kTransposed));
    }
};
template <>
struct Wgmma<Half, 32> {
    template <int kTransposed>
    static MXC_DEVICE void fromShared(float (&d)[4][4], uint64_t a, uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %18, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "%16, %17, p, 1, 1, 0, %19;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3])
            : "l"(a), "l"(b), "r"(keep), "n"(kTransposed));
    }
    template <int kTransposed>
    static MXC_DEVICE void fromRegisters(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %21, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, p, 1, 1, %22;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(kTransposed));
    }
};
template <>
struct Wgmma<Half, 64> {
    template <int kTransposed>
    static MXC_DEVICE void fromShared(float (&d)[8][4], uint64_t a, uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %34, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, %35;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
              "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
              "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
            : "l"(a), "l"(b), "r"(keep), "n"(kTransposed));
    }
    template <int kTransposed>
    static MXC_DEVICE void fromRegisters(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
              "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
              "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
              "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
              "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(kTransposed));
    }
};

}  // namespace mxc

#else
#include "mxc_emulator_hopper.h"
#endif
