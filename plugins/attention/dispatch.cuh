// From checked parameters to kernels; `Runner` starts them on a GPU or, in tests, on the emulator.
#pragma once

#include "attention/attention_tile.cuh"
#include "attention/softmax_attention.h"

namespace mxc {

template <class Element, int kDim, class Runner>
Status runAttentionTyped(const SoftmaxAttentionParams& params, int32_t splits, Runner& runner) noexcept {
    constexpr int64_t kRows = AttentionTile<Element, kDim>::kRows;
    AttentionArgs args{};
    args.q = params.q_BHTK;
    args.k = params.k_BGSK;
    args.v = params.v_BGSK;
    args.out = params.out_BHTK;
    args.past_lengths = params.past_lengths_B;
    args.new_lengths = params.new_lengths_B;
    args.partial = static_cast<float*>(params.workspace);
    args.wide_lengths = params.wide_lengths ? 1 : 0;
    args.tokens = params.tokens;
    args.heads = params.heads;
    args.kv_heads = params.kv_heads;
    args.capacity = params.capacity;
    args.row_tiles =
        static_cast<int32_t>((int64_t{params.tokens} * (params.heads / params.kv_heads) + kRows - 1) / kRows);
    args.splits = splits;
    args.scale_log2 = params.scale * 1.4426950408889634f;
    const int64_t tiles = int64_t{params.batch} * params.kv_heads * args.row_tiles;
    args.pieces = tiles * splits;
    const Status status = runner.template run<AttentionTile<Element, kDim>>(static_cast<unsigned>(args.pieces), args);
    if (status != Status::kOk || splits == 1) return status;
    return runner.template run<AttentionCombine<Element, kDim>>(static_cast<unsigned>(tiles), args);
}

// `params` has passed checkSoftmaxAttention.
template <class Runner>
Status runAttention(const SoftmaxAttentionParams& params, int32_t splits, Runner& runner) noexcept {
    if (params.batch == 0 || params.tokens == 0) return Status::kOk;
    const size_t needed = softmaxAttentionWorkspaceBytes(params, splits);
    if (needed > 0 && (params.workspace == nullptr || params.workspace_bytes < needed)) {
        return fail(Status::kWorkspace, "softmax attention: the workspace has %zu bytes, %zu are needed",
                    params.workspace == nullptr ? size_t{0} : params.workspace_bytes, needed);
    }
    if (params.dtype == DType::kFloat16) {
        return params.head_dim == 128 ? runAttentionTyped<Half, 128>(params, splits, runner)
                                      : runAttentionTyped<Half, 64>(params, splits, runner);
    }
    return params.head_dim == 128 ? runAttentionTyped<BFloat16, 128>(params, splits, runner)
                                  : runAttentionTyped<BFloat16, 64>(params, splits, runner);
}

}  // namespace mxc
