#include "dispatch.h"

#include <cstring>

namespace mxc {
namespace {

// Up to 8 expected rows, an expert rarely has more than 16: one read of its weights.
constexpr int64_t kStreamRows = 8;
// Up to 96 expected rows, tiles of 64 pad less than tiles of 128 and the weights' bytes still cost more than the
// arithmetic.
constexpr int64_t kGrouped64Rows = 96;
constexpr int64_t kSm90Rows = 64;

}  // namespace

bool moeSm90Fits(const MoeShape& shape, int32_t compute_capability) noexcept {
    return compute_capability == 90 && shape.bfloat16 && !shape.int8_weights;
}

MoePlan planMoe(const MoeShape& shape, int32_t compute_capability, bool sm90_allowed) noexcept {
    MoePlan plan;
    if (shape.tokens <= 0 || shape.experts <= 0 || shape.top_k <= 0) return plan;
    plan.pieces = (shape.tokens - 1) / kMoePieceTokens + 1;
    plan.piece_tokens = (shape.tokens - 1) / plan.pieces + 1;
    plan.pieces = (shape.tokens - 1) / plan.piece_tokens + 1;
    plan.small_route = plan.piece_tokens <= kMoeSmallRouteTokens;

    const int64_t rows = int64_t{plan.piece_tokens} * shape.top_k;  // over all experts
    if (plan.piece_tokens <= 8 || rows <= kStreamRows * shape.experts) {
        plan.path = MoePath::kStream;
    } else if (sm90_allowed && moeSm90Fits(shape, compute_capability) && rows >= kSm90Rows * shape.experts) {
        plan.path = MoePath::kSm90;
    } else {
        plan.path = rows <= kGrouped64Rows * shape.experts ? MoePath::kGrouped64 : MoePath::kGrouped128;
    }
    return plan;
}

bool moePathFromName(const char* name, MoePath& path) noexcept {
    constexpr const char* kNames[] = {"stream", "grouped64", "grouped128", "sm90"};
    for (int32_t i = 0; i < 4; ++i) {
        if (std::strcmp(name, kNames[i]) == 0) {
            path = static_cast<MoePath>(i);
            return true;
        }
    }
    return false;
}

}  // namespace mxc
