// Mixture of experts: router (fp32 softmax over all experts, top-k, optional renormalisation), SwiGLU experts, weighted
// sum.
//   out_t = sum over the k chosen experts e of w_te * fc2_e( silu(gate_e x_t) * (up_e x_t) )
//
// Shapes: N tokens, D hidden, E experts, I expert inner width, k experts per token (1..8; tuned for 2).
#pragma once

#include "mxc/types.h"

// As in cuda_runtime_api.h, so that the contract can be read (and its checks tested) where no CUDA headers are.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace mxc {

struct MoeParams {
    const void* x_ND = nullptr;              // `dtype` (fp16 or bf16)
    const void* router_logits_NE = nullptr;  // `router_dtype` (fp32, fp16 or bf16); softmax in fp32
    DType router_dtype = DType::kFloat32;
    // Rows of gate and up interleaved: row 2i is gate i, row 2i+1 is up i (the layout of com.microsoft::MoE,
    // swiglu_fusion=1).
    const void* fc1_E2ID = nullptr;  // `weight_dtype`
    const void* fc2_EDI = nullptr;   // `weight_dtype`
    // int8 weights only: symmetric scales per output row, `dtype` or fp32 as scale_dtype says.
    const void* fc1_scale_E2I = nullptr;
    const void* fc2_scale_ED = nullptr;
    DType scale_dtype = DType::kFloat32;
    void* out_ND = nullptr;

    int32_t tokens = 0;
    int32_t hidden = 0;
    int32_t inner = 0;
    int32_t experts = 0;  // routed over (columns of the logits)
    int32_t top_k = 2;
    // This rank holds experts [first_local, first_local + local_experts); the weights hold only those. 0 means all.
    int32_t first_local = 0;
    int32_t local_experts = 0;
    bool normalize = true;
    DType dtype = DType::kBFloat16;
    DType weight_dtype = DType::kBFloat16;  // dtype, or kInt8 for weight-only quantization

    void* workspace = nullptr;
    size_t workspace_bytes = 0;
};

// Limits: 1..256 experts; hidden and inner multiples of 8 (16 with int8 weights), at most 2^20. x, the weights and out
// are aligned to 16 bytes, the workspace to 256. out overlaps nothing else.
//
// A NaN logit makes the weights of its token NaN (as softmax does), orders below every number, and touches no other
// token.

// Bytes of scratch for at most `tokens` tokens: enough for every path, monotone in tokens and bounded (many tokens are
// done in pieces). A function of shapes and types alone. 0 for no tokens, and for parameters that launchMoe refuses.
size_t moeWorkspaceBytes(const MoeParams& params) noexcept;

// Deterministic: equal inputs give bit-equal outputs. Tokens none of whose experts are local get zeros.
// Environment (read at each launch):
//   MXC_MOE_SM90=1   lets the Hopper (CUTLASS) kernels take many-token launches; off by default
//   MXC_MOE_PATH     stream, grouped64, grouped128 or sm90 instead of the planned path; for tests
Status launchMoe(const MoeParams& params, cudaStream_t stream) noexcept;

}  // namespace mxc
