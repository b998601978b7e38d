// Joins the segments of a prefill: initial state of segment s = decay(s-1) * initial(s-1) + sum(s-1), in fp32, in
// order. The transition over a whole segment is one number per head, so this is an element-wise pass over the segments'
// states.
#pragma once

#include "mxc/device.cuh"
#include "prefill_args.h"

namespace mxc {

template <int kDim>
struct SegmentScan {
    using Args = PrefillArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
    static constexpr int kVectors = kDim * kDim / 4;  // of one state
    static constexpr int kBlocksPerHead = kVectors / kThreads;
    static constexpr int kAhead = 8;  // sums fetched together: they do not depend on each other, only their use does

    static MXC_DEVICE void run(const Args& args, char*) {
        const int index = static_cast<int>(blockIdx.x);
        const int vector = index % kBlocksPerHead * kThreads + static_cast<int>(threadIdx.x);
        const int row = index / kBlocksPerHead;  // batch * heads + head
        const int head = row % args.heads, batch = row / args.heads;
        const int slot = args.slots != nullptr ? args.slots[batch] : batch;
        const bool used = slot >= 0 && slot < args.slot_count;

        float4 running = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (used && args.state_in != nullptr) {
            running = reinterpret_cast<const float4*>(
                args.state_in)[(static_cast<int64_t>(slot) * args.heads + head) * kVectors + vector];
        }
        const int64_t first = static_cast<int64_t>(row) * args.segments;
        float4* states = reinterpret_cast<float4*>(args.segment_states) + first * kVectors + vector;
        const float* decays = args.segment_decays + first;
        const int last = args.segments - 1;  // its own sum is not needed
        for (int begin = 0; begin < last; begin += kAhead) {
            float4 sum[kAhead];
            float decay[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (begin + i < last) {
                    sum[i] = states[static_cast<int64_t>(begin + i) * kVectors];
                    decay[i] = decays[begin + i];
                }
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (begin + i < last) {
                    states[static_cast<int64_t>(begin + i) * kVectors] = running;
                    running.x = running.x * decay[i] + sum[i].x;
                    running.y = running.y * decay[i] + sum[i].y;
                    running.z = running.z * decay[i] + sum[i].z;
                    running.w = running.w * decay[i] + sum[i].w;
                }
            }
        }
        states[static_cast<int64_t>(last) * kVectors] = running;
    }
};

// What T == 0 means where the states are not updated in place: the named slots are copied (or cleared: no input state).
template <int kDim>
struct CopyStates {
    using Args = PrefillArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
    static constexpr int kVectors = kDim * kDim / 4;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int row = static_cast<int>(blockIdx.x);
        const int head = row % args.heads, batch = row / args.heads;
        const int slot = args.slots != nullptr ? args.slots[batch] : batch;
        if (slot < 0 || slot >= args.slot_count) return;
        const int64_t first = (static_cast<int64_t>(slot) * args.heads + head) * kVectors;
        for (int i = static_cast<int>(threadIdx.x); i < kVectors; i += kThreads) {
            const float4 value = args.state_in != nullptr ? reinterpret_cast<const float4*>(args.state_in)[first + i]
                                                          : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            reinterpret_cast<float4*>(args.state_out)[first + i] = value;
        }
    }
};

}  // namespace mxc
