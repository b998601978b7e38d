// How lightning attention is laid over a GPU: pure functions of shapes and the number of multiprocessors.
// No CUDA calls, no environment: the same arguments always give the same plan, so it is tested exhaustively on the
// host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mxc {

constexpr int32_t kLightningChunk = 64;  // tokens of one chunk: fewest operations per token for head_dim 128

// How a prefill is laid over the GPU.
struct LightningPlan {
    int32_t kernel = 0;          // 0 portable mma, 1 sm_90a, 2 sm_90a whose value halves do not share their loads
    int32_t value_splits = 1;    // CTAs that share one head, each with V / value_splits columns of the state
    int32_t segments = 1;        // pieces of the sequence run side by side and joined by a scan
    int32_t segment_chunks = 0;  // chunks of 64 tokens in each segment; the last segment may hold fewer, never none
};

// Chunks of 64 tokens that hold `tokens` (0 for none). Right up to the largest int32.
constexpr int32_t lightningChunks(int32_t tokens) noexcept {
    return tokens <= 0 ? 0 : (tokens - 1) / kLightningChunk + 1;
}

// P = sm_count / (batch * heads) multiprocessors are there for each (sequence, head):
//   P >= 4 and a long sequence  segments: each keeps one P-th of the sequence, an extra pass over k and v sums each
//   segment up; P >= 2                      two CTAs with half of the value columns each (the summary pass would cost
//   what it gains); else                        one CTA per (sequence, head).
// Always plans kernel 0; the caller sets kernel 1 where the sm_90a kernel is wanted (lightningSm90Fits tells whether it
// can). Invalid arguments (negative, zero heads) give the plain plan: the launcher refuses them.
LightningPlan planLightningPrefill(int32_t batch, int32_t tokens, int32_t heads, int32_t head_dim, int32_t sm_count,
                                   int32_t compute_capability) noexcept;

// True where the sm_90a kernel can run the plan: compute capability 90 (10 * major + minor) and head_dim 128.
bool lightningSm90Fits(const LightningPlan& plan, int32_t head_dim, int32_t compute_capability) noexcept;

// Scratch of one launch: the segments' states and their decays. 0 where the plan has one segment.
size_t lightningWorkspaceBytes(const LightningPlan& plan, int32_t batch, int32_t heads, int32_t head_dim) noexcept;

// The largest workspace any launch with batch <= max_batch and tokens <= max_tokens may ask for (what an engine with
// dynamic shapes reserves). Monotone in max_batch and in max_tokens.
size_t lightningMaxWorkspaceBytes(int32_t max_batch, int32_t max_tokens, int32_t heads, int32_t head_dim,
                                  int32_t sm_count, int32_t compute_capability) noexcept;

// CTAs that share one (sequence, head) in decode, each with head_dim / splits value columns: 1 or 4.
int32_t planLightningDecode(int32_t batch, int32_t heads, int32_t head_dim, int32_t sm_count) noexcept;

}  // namespace mxc
