// What every mixture-of-experts kernel is given, for one piece of tokens, and where its scratch lies. No CUDA calls.
//
// Legend: N tokens of the piece, k experts per token, R = N * k pairs of token and choice (pair = token * k + choice),
// E experts routed over, L experts held here, D hidden, I inner. "Rows" are the pairs with a local expert, sorted by
// expert, then by pair.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"
#include "moe.h"

namespace mxc {

struct MoeArgs {
    const uint16_t* x = nullptr;   // [N, D]
    const void* logits = nullptr;  // [N, E]
    const void* fc1 = nullptr;     // [L, 2I, D]
    const void* fc2 = nullptr;     // [L, D, I]
    const void* fc1_scale = nullptr;
    const void* fc2_scale = nullptr;
    uint16_t* out = nullptr;  // [N, D]

    float* pair_weight = nullptr;    // [R]
    int32_t* pair_expert = nullptr;  // [R] local expert, or -1
    int32_t* pair_row = nullptr;     // [R]; undefined where pair_expert is -1
    int32_t* row_token = nullptr;    // [R]
    int32_t* offsets = nullptr;      // [L + 1] first row of each local expert
    uint16_t* inner_rows = nullptr;  // [R, I] silu(gate) * up
    float* out_rows = nullptr;       // [R, D] what each expert gives, not yet weighted
    // sm_90a only
    uint16_t* x_rows = nullptr;  // [R, D]; shares the memory of out_rows, which are written after its last use
    void* grouped = nullptr;     // argument arrays of the grouped GEMM
    size_t grouped_bytes = 0;

    int32_t tokens = 0;
    int32_t hidden = 0;
    int32_t inner = 0;
    int32_t experts = 0;
    int32_t top_k = 0;
    int32_t first_local = 0;
    int32_t local_experts = 0;
    int32_t normalize = 0;
    int32_t router_dtype = 0;  // DType
    int32_t scale_dtype = 0;
};

// Scratch for `tokens` tokens of one piece, whatever the path.
size_t moePieceWorkspace(const MoeParams& params, int32_t tokens) noexcept;

// The arguments of the piece of `tokens` tokens that starts at `first`.
MoeArgs moePieceArgs(const MoeParams& params, int32_t first, int32_t tokens) noexcept;

MoeShape moeShape(const MoeParams& params) noexcept;

}  // namespace mxc
