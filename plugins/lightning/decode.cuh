// Lightning attention for one token: S' = exp(g) S + k v^T, o = scale * q S', in one pass over the fp32 state.
//
// The state [K, V] has V contiguous: a thread keeps 4 neighbouring value columns and walks down the rows (keys), so
// every access is 16 bytes and a group of lanes covers whole lines. The partial sums of q S' over the rows meet in
// shared memory and are added in a fixed order. A CTA's share of a head is all value columns, or a quarter of them
// where there are few heads in all. In place or not: an element is read and written by the same thread.
#pragma once

#include "mxc/device.cuh"
#include "prefill_args.h"

namespace mxc {

template <class Element, int kDim, int kSplits>
struct Decode {
    using Args = PrefillArgs;  // tokens == 1; q, k, v and out point at Elements of any width
    static constexpr int kColumns = kDim / kSplits;
    static constexpr int kLanes = kColumns / 4;  // threads side by side in one row
    static constexpr int kThreads = kSplits == 1 ? 2 * kDim : kDim;
    static constexpr int kMinBlocks = kSplits == 1 ? 2 : 4;
    static constexpr int kRows = kThreads / kLanes;  // rows the CTA covers at once
    static constexpr int kPasses = kDim / kRows;
    static constexpr int kBatch = kPasses < 8 ? kPasses : 8;  // 16-byte loads in flight per thread
    static_assert(kDim % kRows == 0 && kPasses % kBatch == 0, "the rows divide evenly");

    struct Shared {
        float q[kDim];
        float k[kDim];
        float partial[kRows][kColumns];
    };
    static constexpr int kSharedBytes = sizeof(Shared);

    static MXC_DEVICE float load(const void* from, int64_t index) {
        if constexpr (IsFloat32<Element>::value) {
            return static_cast<const float*>(from)[index];
        } else {
            return unpackLow<Element>(static_cast<const uint16_t*>(from)[index]);
        }
    }
    static MXC_DEVICE void store(void* to, int64_t index, float value) {
        if constexpr (IsFloat32<Element>::value) {
            static_cast<float*>(to)[index] = value;
        } else {
            static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(pack<Element>(value, 0.0f) & 0xffffu);
        }
    }

    static MXC_DEVICE void run(const Args& args, char* memory) {
        Shared& shared = *reinterpret_cast<Shared*>(memory);
        const int thread = static_cast<int>(threadIdx.x);
        const int index = static_cast<int>(blockIdx.x);
        const int column0 = index % kSplits * kColumns;
        const int64_t row = index / kSplits;  // batch * heads + head, also the row of q, k, v and out
        const int head = static_cast<int>(row % args.heads), batch = static_cast<int>(row / args.heads);
        const int64_t vectors = row * kDim;

        const int slot = args.slots != nullptr ? args.slots[batch] : batch;
        const bool used = slot >= 0 && slot < args.slot_count;
        const bool valid = used && (args.lengths == nullptr || args.lengths[batch] > 0);
        const int lane = thread % kLanes, row0 = thread / kLanes;
        const int64_t first = (static_cast<int64_t>(slot) * args.heads + head) * (kDim * kDim) + column0 + lane * 4;

        if (!valid) {  // the whole CTA
            if (thread < kColumns) store(args.out, vectors + column0 + thread, 0.0f);
            if (!used || args.state_in == args.state_out) return;
            for (int r = row0; r < kDim; r += kRows) {
                float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (args.state_in != nullptr)
                    value = *reinterpret_cast<const float4*>(args.state_in + first + r * kDim);
                *reinterpret_cast<float4*>(args.state_out + first + r * kDim) = value;
            }
            return;
        }

        float4 state[kBatch];
        fetch(state, args.state_in, first, row0);
        for (int i = thread; i < kDim; i += kThreads) {
            shared.q[i] = load(args.q, vectors + i) * args.scale;
            shared.k[i] = load(args.k, vectors + i);
        }
        float value[4];
        for (int i = 0; i < 4; ++i) value[i] = load(args.v, vectors + column0 + lane * 4 + i);
        const float decay =
            expf(args.log_decay != nullptr ? boundLogDecay(args.log_decay[row]) : boundLogDecay(-args.slopes[head]));
        syncBlock();

        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int begin = 0; begin < kPasses; begin += kBatch) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int r = row0 + (begin + i) * kRows;
                const float key = shared.k[r], query = shared.q[r];
                float4 s = state[i];
                s.x = s.x * decay + key * value[0];
                s.y = s.y * decay + key * value[1];
                s.z = s.z * decay + key * value[2];
                s.w = s.w * decay + key * value[3];
                sum[0] += query * s.x;
                sum[1] += query * s.y;
                sum[2] += query * s.z;
                sum[3] += query * s.w;
                state[i] = s;
            }
            float4 next[kBatch];
            if (begin + kBatch < kPasses) fetch(next, args.state_in, first, row0 + (begin + kBatch) * kRows);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                storeStreaming(reinterpret_cast<float4*>(args.state_out + first + (row0 + (begin + i) * kRows) * kDim),
                               state[i]);
                if (begin + kBatch < kPasses) state[i] = next[i];
            }
        }
        for (int i = 0; i < 4; ++i) shared.partial[row0][lane * 4 + i] = sum[i];
        syncBlock();
        if (thread < kColumns) {
            float total = 0.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r) total += shared.partial[r][thread];
            store(args.out, vectors + column0 + thread, total);
        }
    }

  private:
    static MXC_DEVICE void fetch(float4 (&state)[kBatch], const float* from, int64_t first, int row) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            state[i] = from != nullptr
                           ? loadStreaming(reinterpret_cast<const float4*>(from + first + (row + i * kRows) * kDim))
                           : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
};

}  // namespace mxc
