// Lightning (gated linear) attention with one scalar decay per head and token:
//   S_t = exp(g_t) S_(t-1) + k_t v_t^T,   o_t = scale * q_t S_t        (state S fp32 [d_k, d_v])
// One launcher for prefill and one for decode; both take the same parameters.
//
// Shapes: B sequences, T new tokens (padded), H heads, K = V = head_dim (64 or 128), P state slots.
#pragma once

#include "mxc/types.h"
#include "planner.h"

// As in cuda_runtime_api.h, so that the contract can be read (and its checks tested) where no CUDA headers are.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace mxc {

struct LightningParams {
    // [B, T, H, K], [B, T, H, K], [B, T, H, V] and out [B, T, H, V], contiguous, `dtype` (fp16 or bf16; fp32 only where
    // the catalog says so).
    const void* q_BTHK = nullptr;
    const void* k_BTHK = nullptr;
    const void* v_BTHV = nullptr;
    void* out_BTHV = nullptr;

    // fp32 states [P, H, K, V]. In and out may be the same memory (in place) or disjoint; never partly overlapping.
    // state_in may be null: zeros.
    const float* state_in_PHKV = nullptr;
    float* state_out_PHKV = nullptr;
    // [B] slot of each sequence in the pools, or null: sequence b uses slot b. Slots not named stay untouched. A slot
    // outside 0..P-1 marks an unused row: its outputs are zeros and no state is read or written. No slot may be named
    // twice.
    const int32_t* slots_B = nullptr;

    // The decay, one of two forms:
    //  - log_decay_BTH: g per token, fp32 [B, T, H], every value <= 0 (0 keeps the state), or
    //  - slopes_H: g = -slopes_H[h] on every valid token (fp32, >= 0); the kernels then use a 65-entry table.
    // Values are taken into [-104, 0] (exp(-104) is 0 in fp32), so that no exp() can grow; NaN stays NaN.
    const float* log_decay_BTH = nullptr;
    const float* slopes_H = nullptr;
    // [B] valid new tokens of each row (taken into 0..T), or null: T. Tokens past the length neither decay nor feed the
    // state, are never read, and their outputs are written as zeros.
    const int32_t* lengths_B = nullptr;

    int32_t batch = 0;
    int32_t tokens = 0;
    int32_t heads = 0;
    int32_t head_dim = 0;
    int32_t slots = 0;  // P; 0 means batch
    float scale = 1.0f;
    DType dtype = DType::kBFloat16;

    void* workspace = nullptr;
    size_t workspace_bytes = 0;
};

// Any T >= 0; dtype fp16 or bf16. `plan` may be null: planned for the current device (with the sm_90a kernel where it
// fits and the environment has MXC_LIGHTNING_SM90=1, or 2: see LightningPlan). With fp16, |q k| and the state's
// elements must stay below 65504.
Status launchLightningPrefill(const LightningParams& params, const LightningPlan* plan, cudaStream_t stream) noexcept;
// T == 0 or 1 only: one pass over the state. dtype fp16, bf16 or fp32.
Status launchLightningDecode(const LightningParams& params, cudaStream_t stream) noexcept;

}  // namespace mxc
