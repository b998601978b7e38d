// What device.cuh has for floats, for integers too: votes and shuffles of a warp, read-only 16-byte loads, bytes to
// 16-bit floats. Host compilers get the same functions from the emulator (tests/plugins/emulator).
#pragma once

#include "mxc/device.cuh"

#if defined(__CUDACC__)

namespace mxc {

MXC_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
MXC_DEVICE float shuffleXor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MXC_DEVICE int32_t shuffleXor(int32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MXC_DEVICE int32_t shuffleUp(int32_t value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
MXC_DEVICE int32_t shuffle(int32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
MXC_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
MXC_DEVICE int lowestBit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
MXC_DEVICE float exponential(float value) { return __expf(value); }
MXC_DEVICE float bitsToFloat(uint32_t bits) { return __uint_as_float(bits); }
// Byte i of the result is the byte of {a, b} (a low) that nibble i of the selector names.
MXC_DEVICE uint32_t bytePermute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

MXC_DEVICE uint32_t loadShared16(uint32_t address) {
    uint16_t out;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(out) : "r"(address) : "memory");
    return out;
}

// Memory that no thread writes while the kernel runs. Streamed: used once, so not kept in the L1.
MXC_DEVICE uint4 loadStreamed16(const void* global) {
    uint4 out;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(global));
    return out;
}
MXC_DEVICE uint4 loadCached16(const void* global) { return __ldg(static_cast<const uint4*>(global)); }

}  // namespace mxc

#else
#include "mxc_emulator_warp.h"
#endif

namespace mxc {

MXC_DEVICE int32_t warpSum(int32_t value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffleXor(value, mask);
    return value;
}

// Bytes 2i and 2i+1 (i = 0 or 1) of four int8, as a pair of 16-bit floats (exact). 0x4b0000uu is the float 2^23 + uu.
template <class Element>
MXC_DEVICE uint32_t int8Pair(uint32_t word, int i) {
    const uint32_t biased = word ^ 0x80808080u;  // q + 128
    const float low = bitsToFloat(bytePermute(biased, 0x4b000000u, i == 0 ? 0x7440u : 0x7442u)) - 8388736.0f;
    const float high = bitsToFloat(bytePermute(biased, 0x4b000000u, i == 0 ? 0x7441u : 0x7443u)) - 8388736.0f;
    return pack<Element>(low, high);
}

}  // namespace mxc
