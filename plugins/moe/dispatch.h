// Which kernels a mixture-of-experts launch runs, and in how many pieces: pure functions of shapes, tested on the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mxc {

enum class MoePath : int32_t {
    kStream = 0,      // few rows per expert: weights stream through registers, the tokens are the mma's 8 columns
    kGrouped64 = 1,   // grouped GEMM with tiles of 64 tokens, where reading the weights decides
    kGrouped128 = 2,  // tiles of 128 tokens, where arithmetic decides
    kSm90 = 3,        // CUTLASS grouped GEMM with wgmma (bf16, compute capability 9.0)
};

struct MoeShape {
    int32_t tokens = 0;
    int32_t experts = 0;  // routed over
    int32_t top_k = 0;
    bool int8_weights = false;
    bool bfloat16 = true;
};

struct MoePlan {
    MoePath path = MoePath::kStream;
    int32_t pieces = 1;        // launches over consecutive tokens
    int32_t piece_tokens = 0;  // tokens of each piece (the last may hold fewer, never none)
    bool small_route = false;  // router and sort in one kernel of one block
};

constexpr int32_t kMoeMaxExperts = 256;
constexpr int32_t kMoeMaxTopK = 8;
// Most tokens of one piece: bounds the workspace; by then every expert has about a thousand rows, so pieces cost
// nothing.
constexpr int32_t kMoePieceTokens = 16384;
// The one-block router holds at most this many tokens.
constexpr int32_t kMoeSmallRouteTokens = 32;

// True where the sm_90a kernels compute this: bf16 tokens and weights, compute capability 9.0 exactly.
bool moeSm90Fits(const MoeShape& shape, int32_t compute_capability) noexcept;

// The rows an expert may expect (tokens * top_k / experts; routing is not known on the host) decide. Every path is
// right for every routing; a skewed one only costs time. sm90_allowed: the caller wants the sm_90a kernels and has the
// workspace for them.
MoePlan planMoe(const MoeShape& shape, int32_t compute_capability, bool sm90_allowed) noexcept;

// The same pieces with the path named: "stream", "grouped64", "grouped128", "sm90". False for another name.
bool moePathFromName(const char* name, MoePath& path) noexcept;

}  // namespace mxc
