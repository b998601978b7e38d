// Softmax attention over a key/value cache with lengths, for decode and (more slowly) prefill:
//   out[b, h, t] = softmax over s <= past_b + t of (scale * q[b, h, t] . k[b, g, s]) times v[b, g, s],   g = h / (H /
//   G)
// Nothing at or behind position past_b + new_b of the cache is read, so garbage there cannot leak; the time follows the
// lengths, not the capacity. The cache already holds the new tokens.
//
// Shapes: B sequences, T new tokens (padded), H heads, G key/value heads, S cache capacity, K = head_dim (64 or 128).
#pragma once

#include <cstddef>
#include <cstdint>

#include "mxc/types.h"

// As in cuda_runtime_api.h, so that the contract can be read (and its checks tested) where no CUDA headers are.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace mxc {

struct SoftmaxAttentionParams {
    const void* q_BHTK = nullptr;  // `dtype`, contiguous, as k, v and out are
    const void* k_BGSK = nullptr;
    const void* v_BGSK = nullptr;
    void* out_BHTK = nullptr;  // zeros in rows past the new length
    // [B] tokens before the new ones (taken into 0..S) and valid new ones (taken into 0..min(T, S - past)).
    const void* past_lengths_B = nullptr;
    const void* new_lengths_B = nullptr;
    bool wide_lengths = false;  // int64 instead of int32

    int32_t batch = 0;
    int32_t tokens = 0;
    int32_t heads = 0;
    int32_t kv_heads = 0;
    int32_t capacity = 0;
    int32_t head_dim = 0;
    float scale = 1.0f;
    DType dtype = DType::kBFloat16;  // fp16 or bf16

    void* workspace = nullptr;  // aligned to 256 bytes
    size_t workspace_bytes = 0;
};

// Pieces that the keys of one tile of 16 rows are cut into, so that few tiles still fill `sm_count` multiprocessors.
int32_t softmaxAttentionSplits(const SoftmaxAttentionParams& params, int32_t sm_count) noexcept;
size_t softmaxAttentionWorkspaceBytes(const SoftmaxAttentionParams& params, int32_t splits) noexcept;
// No launch with this head_dim, on any GPU, asks for more.
size_t softmaxAttentionMaxWorkspaceBytes(int32_t head_dim) noexcept;
// Refuses what the kernels do not do; looks at no memory.
Status checkSoftmaxAttention(const SoftmaxAttentionParams& params) noexcept;

// Deterministic. T == 0 or B == 0 is nothing to do.
Status launchSoftmaxAttention(const SoftmaxAttentionParams& params, cudaStream_t stream) noexcept;

}  // namespace mxc
