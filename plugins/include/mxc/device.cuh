// The few instructions the kernels are made of, each as a function: 16-byte copies into shared memory, ldmatrix, mma,
// packing. On a GPU they are PTX. Compiled by an ordinary host compiler they come from mxc_emulator.h
// (tests/plugins/emulator), which runs a kernel's own code on the CPU, so its indexing, barriers and arithmetic are
// tested where there is no GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#define MXC_DEVICE __device__ __forceinline__

namespace mxc {

// Element types as stored: 16 bits, never used in arithmetic as they are.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// Shared memory is named by 32-bit byte addresses: constant offsets then fold into the instructions, where generic
// pointers would each take registers of their own.
MXC_DEVICE uint32_t sharedAddress(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

MXC_DEVICE void syncBlock() { __syncthreads(); }
MXC_DEVICE float shuffleUp(float value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
MXC_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

MXC_DEVICE uint32_t shuffleXor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Copies 16 bytes of global memory into shared memory asynchronously; writes zeros (and reads nothing) where !valid.
MXC_DEVICE void copyAsync16(uint32_t shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
MXC_DEVICE void copyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
MXC_DEVICE void copyAsyncWait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 tiles of 16-bit elements; lane l names row l%8 of tile l/8. Register i of lane l: row l/4, columns 2(l%4),
// +1 of tile i (transposed: rows 2(l%4), +1 of column l/4).
MXC_DEVICE void loadMatrix4(uint32_t (&out)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}
MXC_DEVICE void loadMatrix4Transposed(uint32_t (&out)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}
MXC_DEVICE void storeShared32(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// Transposes the 8x8 tile that the warp holds one register each of.
MXC_DEVICE uint32_t transposeMatrix(uint32_t value) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
    return out;
}

// D[16, 8] += A[16, 16] B[16, 8], fp32 sums.
template <class Element>
MXC_DEVICE void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
MXC_DEVICE void mma16816<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
MXC_DEVICE void mma16816<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to nearest even; `low` in bits 0..15.
template <class Element>
MXC_DEVICE uint32_t pack(float low, float high);
template <>
MXC_DEVICE uint32_t pack<BFloat16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
template <>
MXC_DEVICE uint32_t pack<Half>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
template <class Element>
MXC_DEVICE float unpackLow(uint32_t pair);
template <class Element>
MXC_DEVICE float unpackHigh(uint32_t pair);
template <>
MXC_DEVICE float unpackLow<BFloat16>(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
template <>
MXC_DEVICE float unpackHigh<BFloat16>(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
template <>
MXC_DEVICE float unpackLow<Half>(uint32_t pair) {
    float out;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(out) : "r"(pair));
    return out;
}
template <>
MXC_DEVICE float unpackHigh<Half>(uint32_t pair) {
    float out;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(out) : "r"(pair));
    return out;
}

// Global accesses of data that is used once: marked to leave the caches first.
MXC_DEVICE float4 loadStreaming(const float4* global) { return __ldcs(global); }
MXC_DEVICE void storeStreaming(float4* global, float4 value) { __stcs(global, value); }

}  // namespace mxc

#else
#include "mxc_emulator.h"
#endif

namespace mxc {

template <class Element>
struct IsFloat32 {
    static constexpr bool value = false;
};
template <>
struct IsFloat32<float> {
    static constexpr bool value = true;
};

// A log-decay as the kernels take it: in [-104, 0], NaN kept.
MXC_DEVICE float boundLogDecay(float g) { return g > 0.0f ? 0.0f : (g < -104.0f ? -104.0f : g); }

}  // namespace mxc
