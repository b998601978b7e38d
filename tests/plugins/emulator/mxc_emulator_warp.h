// The emulator's side of mxc/warp.cuh.
#pragma once

#include "mxc_emulator.h"

namespace mxc {

inline uint32_t ballot(bool predicate) {
    static const char kind = 0;
    struct Args {
        bool predicate;
        uint32_t out;
    } args{predicate, 0};
    emu::block.warpCollective(&kind, args, [](Args** all) {
        uint32_t bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(all[lane]->predicate) << lane;
        for (int lane = 0; lane < 32; ++lane) all[lane]->out = bits;
    });
    return args.out;
}

template <class Value, class Function>
Value exchange(Value value, int operand, const void* kind, Function source) {
    struct Args {
        Value value, out;
        int operand;
    } args{value, value, operand};
    emu::block.warpCollective(kind, args, [source](Args** all) {
        for (int lane = 0; lane < 32; ++lane) {
            if (all[lane]->operand != all[0]->operand)
                emu::block.abandon("the lanes of a warp shuffle by different amounts");
            all[lane]->out = all[source(lane, all[0]->operand)]->value;
        }
    });
    return args.out;
}
template <class Value>
Value shuffleXor(Value value, int mask) {
    static const char kind = 0;
    return exchange(value, mask, &kind, [](int lane, int by) { return lane ^ by; });
}
inline int32_t shuffleUp(int32_t value, int delta) {
    static const char kind = 0;
    return exchange(value, delta, &kind, [](int lane, int by) { return lane >= by ? lane - by : lane; });
}
inline int32_t shuffle(int32_t value, int from) {
    static const char kind = 0;
    return exchange(value, from, &kind, [](int, int by) { return by; });
}
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowestBit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline float exponential(float value) { return std::exp(value); }
inline float bitsToFloat(uint32_t bits) { return emu::toFloat(bits); }
inline uint32_t bytePermute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = selector >> (4 * i) & 7u;
        out |= ((from < 4 ? a : b) >> (8 * (from % 4)) & 0xffu) << (8 * i);
    }
    return out;
}
inline uint32_t loadShared16(uint32_t address) {
    uint16_t out;
    memcpy(&out, emu::sharedMemory(address, 2), 2);
    return out;
}
inline uint4 loadStreamed16(const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emu::block.abandon("misaligned global load");
    return *static_cast<const uint4*>(global);
}
inline uint4 loadCached16(const void* global) { return loadStreamed16(global); }

}  // namespace mxc
