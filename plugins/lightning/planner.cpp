#include "planner.h"

#include <algorithm>

namespace mxc {
namespace {

// A segment shorter than this costs more in its state (64 KB written, scanned and read) than it wins.
constexpr int32_t kMinSegmentChunks = 4;
constexpr int32_t kMinSpareForSegments = 4;

size_t alignUp(size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }

}  // namespace

LightningPlan planLightningPrefill(int32_t batch, int32_t tokens, int32_t heads, int32_t head_dim, int32_t sm_count,
                                   int32_t compute_capability) noexcept {
    static_cast<void>(
        compute_capability);  // one rule for all so far; part of the signature so that a tuned rule may differ
    LightningPlan plan;
    const int32_t chunks = lightningChunks(tokens);
    plan.segment_chunks = chunks;
    if (batch <= 0 || heads <= 0 || sm_count <= 0 || chunks == 0) return plan;

    const int64_t spare = sm_count / (static_cast<int64_t>(batch) * heads);
    if (spare >= kMinSpareForSegments && chunks / kMinSegmentChunks >= kMinSpareForSegments) {
        const int32_t wanted = static_cast<int32_t>(std::min<int64_t>(spare, chunks / kMinSegmentChunks));
        plan.segment_chunks = (chunks - 1) / wanted + 1;
        plan.segments = (chunks - 1) / plan.segment_chunks + 1;  // may be fewer than wanted, but none is empty
    } else if (spare >= 2 && head_dim == 128) {
        plan.value_splits = 2;
    }
    return plan;
}

bool lightningSm90Fits(const LightningPlan& plan, int32_t head_dim, int32_t compute_capability) noexcept {
    return compute_capability == 90 && head_dim == 128 && (plan.value_splits == 1 || plan.value_splits == 2);
}

size_t lightningWorkspaceBytes(const LightningPlan& plan, int32_t batch, int32_t heads, int32_t head_dim) noexcept {
    if (plan.segments <= 1 || batch <= 0 || heads <= 0 || head_dim <= 0) return 0;
    const size_t pieces = static_cast<size_t>(batch) * static_cast<size_t>(heads) * static_cast<size_t>(plan.segments);
    const size_t state = static_cast<size_t>(head_dim) * static_cast<size_t>(head_dim) * sizeof(float);
    return alignUp(pieces * state) + alignUp(pieces * sizeof(float));
}

size_t lightningMaxWorkspaceBytes(int32_t max_batch, int32_t max_tokens, int32_t heads, int32_t head_dim,
                                  int32_t sm_count, int32_t compute_capability) noexcept {
    if (max_batch <= 0 || max_tokens <= 0 || heads <= 0 || sm_count <= 0) return 0;
    static_cast<void>(compute_capability);
    size_t most = 0;
    // No batch beyond this has spare multiprocessors for segments, so the loop is short whatever max_batch is.
    const int32_t last = std::min(max_batch, sm_count / kMinSpareForSegments / heads);
    const int32_t chunks = lightningChunks(max_tokens);
    for (int32_t batch = 1; batch <= last; ++batch) {
        // The number of segments is not monotone in the length (rounding), its bound is.
        const int32_t bound = std::min(sm_count / (batch * heads), chunks / kMinSegmentChunks);
        if (bound < kMinSpareForSegments) continue;
        LightningPlan plan;
        plan.segments = bound;
        most = std::max(most, lightningWorkspaceBytes(plan, batch, heads, head_dim));
    }
    return most;
}

int32_t planLightningDecode(int32_t batch, int32_t heads, int32_t head_dim, int32_t sm_count) noexcept {
    static_cast<void>(head_dim);
    // One CTA moves 64 KB in each direction; below some four per multiprocessor the memory system is not kept busy.
    return static_cast<int64_t>(batch) * heads >= static_cast<int64_t>(4) * sm_count ? 1 : 4;
}

}  // namespace mxc
