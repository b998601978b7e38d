// out[t] = sum over j of weight[t, j] * row of (t, j), in the order j = 0..k-1, in fp32, rounded once. Choices without
// a local expert add nothing; a token without any gets zeros.
#pragma once

#include "moe_args.h"
#include "mxc/warp.cuh"

namespace mxc {

// Grid: N * ceil(D / 1024).
template <class Element>
struct MoeCombine {
    using Args = MoeArgs;
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 8;
    static constexpr int kColumns = 8 * kThreads;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int parts = (args.hidden + kColumns - 1) / kColumns;
        const int token = static_cast<int>(blockIdx.x) / parts;
        const int column = static_cast<int>(blockIdx.x) % parts * kColumns + static_cast<int>(threadIdx.x) * 8;
        if (column >= args.hidden) return;
        float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int choice = 0; choice < args.top_k; ++choice) {
            const int pair = token * args.top_k + choice;
            if (args.pair_expert[pair] < 0) continue;
            const float weight = args.pair_weight[pair];
            const float4* row = reinterpret_cast<const float4*>(
                args.out_rows + static_cast<int64_t>(args.pair_row[pair]) * args.hidden + column);
            const float4 low = loadStreaming(row), high = loadStreaming(row + 1);
            const float value[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += weight * value[i];
        }
        *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(token) * args.hidden + column) =
            make_uint4(pack<Element>(sum[0], sum[1]), pack<Element>(sum[2], sum[3]), pack<Element>(sum[4], sum[5]),
                       pack<Element>(sum[6], sum[7]));
    }
};

}  // namespace mxc
