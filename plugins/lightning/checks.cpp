#include "checks.h"

#include <cmath>

namespace mxc {
namespace {

struct Range {
    const char* name;
    const void* begin;
    int64_t bytes;
};

bool overlap(const Range& a, const Range& b) noexcept {
    if (a.begin == nullptr || b.begin == nullptr || a.bytes == 0 || b.bytes == 0) return false;
    const auto first = reinterpret_cast<uintptr_t>(a.begin), second = reinterpret_cast<uintptr_t>(b.begin);
    return first < second + static_cast<uintptr_t>(b.bytes) && second < first + static_cast<uintptr_t>(a.bytes);
}

bool aligned(const void* pointer, uintptr_t bytes) noexcept {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// a * b * ..., or -1 where it does not fit into 62 bits.
int64_t product(int64_t a, int64_t b) noexcept {
    int64_t out = 0;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &out) || out > (int64_t{1} << 62)) return -1;
    return out;
}

}  // namespace

Status checkLightning(const LightningParams& params, LightningOp op) noexcept {
    const char* name = op == LightningOp::kPrefill ? "lightning prefill" : "lightning decode";
    const auto bad = Status::kInvalidArgument;
    if (params.head_dim != 64 && params.head_dim != 128) {
        return fail(Status::kUnsupported, "%s: head_dim %d is not supported; use 64 or 128", name, params.head_dim);
    }
    if (params.batch < 0) return fail(bad, "%s: batch %d is negative", name, params.batch);
    if (params.tokens < 0) return fail(bad, "%s: tokens %d is negative", name, params.tokens);
    if (params.tokens > (1 << 30))
        return fail(bad, "%s: %d tokens are more than 2^30; split the sequence", name, params.tokens);
    if (params.heads <= 0) return fail(bad, "%s: heads %d must be at least 1", name, params.heads);
    if (params.slots < 0) return fail(bad, "%s: slots %d is negative; 0 means one per sequence", name, params.slots);
    if (op == LightningOp::kDecode && params.tokens > 1) {
        return fail(bad, "%s: takes one new token per sequence, got %d; use the prefill", name, params.tokens);
    }
    const bool half = params.dtype == DType::kFloat16 || params.dtype == DType::kBFloat16;
    if (!half && !(params.dtype == DType::kFloat32 && op == LightningOp::kDecode)) {
        return fail(Status::kUnsupported, "%s: dtype %d is not supported; use %s", name, static_cast<int>(params.dtype),
                    op == LightningOp::kDecode ? "fp16, bf16 or fp32" : "fp16 or bf16");
    }
    if (!std::isfinite(params.scale)) return fail(bad, "%s: scale is not finite", name);
    if (params.batch == 0) return Status::kOk;

    const int32_t slots = params.slots == 0 ? params.batch : params.slots;
    if (params.slots_B == nullptr && slots < params.batch) {
        return fail(bad, "%s: %d slots for %d sequences and no slot numbers; give slots_B or more slots", name, slots,
                    params.batch);
    }
    const int64_t width = half ? 2 : 4;
    const int64_t state_bytes = product(product(slots, params.heads), int64_t{4} * params.head_dim * params.head_dim);
    const int64_t row_bytes =
        product(product(product(params.batch, params.tokens), params.heads), width * params.head_dim);
    if (state_bytes < 0 || row_bytes < 0) return fail(bad, "%s: the tensors' sizes overflow 64 bits", name);
    // CTAs are counted in one int32 grid dimension; 64 is the most any kernel starts per sequence and head.
    if (product(params.batch, params.heads) > (int64_t{1} << 31) / 64 - 1) {
        return fail(bad, "%s: batch %d times heads %d is too large for one launch", name, params.batch, params.heads);
    }

    if (params.state_out_PHKV == nullptr) return fail(bad, "%s: state_out is null", name);
    const Range states[2] = {{"state_in", params.state_in_PHKV, state_bytes},
                             {"state_out", params.state_out_PHKV, state_bytes}};
    const Range rows[4] = {{"q", params.q_BTHK, row_bytes},
                           {"k", params.k_BTHK, row_bytes},
                           {"v", params.v_BTHV, row_bytes},
                           {"out", params.out_BTHV, row_bytes}};
    for (const Range& range : states) {
        if (!aligned(range.begin, 16)) return fail(bad, "%s: %s is not aligned to 16 bytes", name, range.name);
    }
    if (params.state_in_PHKV != params.state_out_PHKV && overlap(states[0], states[1])) {
        return fail(bad, "%s: state_in and state_out overlap in part; give the same pointer or disjoint memory", name);
    }
    if (!aligned(params.slots_B, 4)) return fail(bad, "%s: slots_B is not aligned to 4 bytes", name);
    if (params.tokens == 0) return Status::kOk;

    for (const Range& range : rows) {
        if (range.begin == nullptr) return fail(bad, "%s: %s is null", name, range.name);
        if (!aligned(range.begin, 16)) return fail(bad, "%s: %s is not aligned to 16 bytes", name, range.name);
        for (const Range& state : states) {
            if (overlap(range, state)) return fail(bad, "%s: %s overlaps %s", name, range.name, state.name);
        }
    }
    for (int i = 0; i < 3; ++i) {
        if (overlap(rows[i], rows[3])) return fail(bad, "%s: out overlaps %s", name, rows[i].name);
    }
    if ((params.log_decay_BTH == nullptr) == (params.slopes_H == nullptr)) {
        return fail(bad, "%s: give log_decay_BTH or slopes_H, exactly one of them", name);
    }
    if (!aligned(params.log_decay_BTH, 4)) return fail(bad, "%s: log_decay_BTH is not aligned to 4 bytes", name);
    if (!aligned(params.slopes_H, 4)) return fail(bad, "%s: slopes_H is not aligned to 4 bytes", name);
    if (!aligned(params.lengths_B, 4)) return fail(bad, "%s: lengths_B is not aligned to 4 bytes", name);
    return Status::kOk;
}

Status checkLightningPlan(const LightningParams& params, const LightningPlan& plan,
                          int32_t compute_capability) noexcept {
    const auto bad = Status::kInvalidArgument;
    if (compute_capability < 80) {
        return fail(Status::kArchitecture,
                    "lightning prefill: compute capability %d.%d is too old; 8.0 or later is needed",
                    compute_capability / 10, compute_capability % 10);
    }
    if (plan.kernel < 0 || plan.kernel > 2)
        return fail(bad, "lightning prefill: plan.kernel %d is unknown", plan.kernel);
    if (plan.kernel != 0 && !lightningSm90Fits(plan, params.head_dim, compute_capability)) {
        return fail(Status::kArchitecture,
                    "lightning prefill: the sm_90a kernel needs compute capability 9.0 and head_dim 128");
    }
    if (plan.value_splits != 1 && !(plan.value_splits == 2 && params.head_dim == 128)) {
        return fail(bad, "lightning prefill: %d value splits are not supported for head_dim %d", plan.value_splits,
                    params.head_dim);
    }
    const int64_t chunks = lightningChunks(params.tokens);
    const int64_t covered = product(plan.segments, plan.segment_chunks);
    if (plan.segments < 1 || plan.segments > 1024 || covered < chunks || covered - plan.segment_chunks >= chunks) {
        return fail(bad, "lightning prefill: %d segments of %d chunks do not cover %d tokens without an empty one",
                    plan.segments, plan.segment_chunks, params.tokens);
    }
    const int64_t pieces = product(product(params.batch, params.heads), int64_t{plan.segments} * plan.value_splits);
    if (pieces < 0 || pieces > INT32_MAX)
        return fail(bad, "lightning prefill: the plan has too many CTAs for one launch");
    const size_t needed = lightningWorkspaceBytes(plan, params.batch, params.heads, params.head_dim);
    if (needed == 0) return Status::kOk;
    if (params.workspace == nullptr || params.workspace_bytes < needed) {
        return fail(Status::kWorkspace, "lightning prefill: the workspace has %zu bytes, %zu are needed",
                    params.workspace == nullptr ? size_t{0} : params.workspace_bytes, needed);
    }
    if (!aligned(params.workspace, 256))
        return fail(bad, "lightning prefill: the workspace is not aligned to 256 bytes");
    return Status::kOk;
}

}  // namespace mxc
