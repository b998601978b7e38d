#include <algorithm>
#include <cmath>

#include "attention/softmax_attention.h"

namespace mxc {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kKeyBlock = 64;
constexpr int32_t kMostMultiprocessors = 256;  // no GPU has more
constexpr int64_t kMostSplits = 64;

int64_t tiles(const SoftmaxAttentionParams& params) noexcept {
    const int64_t rows = int64_t{params.tokens} * (params.heads / params.kv_heads);
    return int64_t{params.batch} * params.kv_heads * ((rows + kTileRows - 1) / kTileRows);
}

size_t pieceBytes(int32_t head_dim) noexcept {  // sums of 16 rows, their maxima and weights
    return (kTileRows * static_cast<size_t>(head_dim) + 2 * kTileRows) * sizeof(float);
}

bool aligned(const void* pointer, uintptr_t bytes) noexcept {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace

int32_t softmaxAttentionSplits(const SoftmaxAttentionParams& params, int32_t sm_count) noexcept {
    const int64_t count = tiles(params);
    const int64_t sms = std::min(sm_count, kMostMultiprocessors);
    if (count <= 0 || count >= 2 * sms) return 1;
    const int64_t blocks = (params.capacity + kKeyBlock - 1) / kKeyBlock;
    return static_cast<int32_t>(std::max<int64_t>(1, std::min({4 * sms / count, blocks / 2, kMostSplits})));
}

size_t softmaxAttentionWorkspaceBytes(const SoftmaxAttentionParams& params, int32_t splits) noexcept {
    if (splits <= 1) return 0;
    return static_cast<size_t>(tiles(params)) * static_cast<size_t>(splits) * pieceBytes(params.head_dim);
}

size_t softmaxAttentionMaxWorkspaceBytes(int32_t head_dim) noexcept {
    return size_t{4} * kMostMultiprocessors * pieceBytes(head_dim);  // tiles * splits is at most 4 per multiprocessor
}

Status checkSoftmaxAttention(const SoftmaxAttentionParams& params) noexcept {
    constexpr char kName[] = "softmax attention";
    const auto bad = Status::kInvalidArgument;
    if (params.head_dim != 64 && params.head_dim != 128) {
        return fail(Status::kUnsupported, "%s: head_dim %d is not supported; use 64 or 128", kName, params.head_dim);
    }
    if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
        return fail(Status::kUnsupported, "%s: dtype %d is not supported; use fp16 or bf16", kName,
                    static_cast<int>(params.dtype));
    }
    if (params.batch < 0) return fail(bad, "%s: batch %d is negative", kName, params.batch);
    if (params.tokens < 0) return fail(bad, "%s: tokens %d is negative", kName, params.tokens);
    if (params.capacity < 0) return fail(bad, "%s: capacity %d is negative", kName, params.capacity);
    if (params.kv_heads <= 0 || params.heads <= 0 || params.heads % params.kv_heads != 0) {
        return fail(bad, "%s: heads %d must be a multiple of kv_heads %d, both at least 1", kName, params.heads,
                    params.kv_heads);
    }
    if (params.tokens > params.capacity) {
        return fail(bad, "%s: %d new tokens do not fit a capacity of %d", kName, params.tokens, params.capacity);
    }
    if (!std::isfinite(params.scale)) return fail(bad, "%s: scale is not finite", kName);
    if (params.batch == 0 || params.tokens == 0) return Status::kOk;
    if (int64_t{params.tokens} * params.heads > INT32_MAX - 16 || tiles(params) > INT32_MAX / kMostSplits) {
        return fail(bad, "%s: batch, tokens and heads are too large for one launch", kName);
    }
    const struct {
        const char* name;
        const void* pointer;
        uintptr_t alignment;
    } pointers[] = {{"q", params.q_BHTK, 16},
                    {"k", params.k_BGSK, 16},
                    {"v", params.v_BGSK, 16},
                    {"out", params.out_BHTK, 16},
                    {"past_lengths", params.past_lengths_B, params.wide_lengths ? 8u : 4u},
                    {"new_lengths", params.new_lengths_B, params.wide_lengths ? 8u : 4u}};
    for (const auto& entry : pointers) {
        if (entry.pointer == nullptr) return fail(bad, "%s: %s is null", kName, entry.name);
        if (!aligned(entry.pointer, entry.alignment)) {
            return fail(bad, "%s: %s is not aligned to %d bytes", kName, entry.name, static_cast<int>(entry.alignment));
        }
    }
    if (!aligned(params.workspace, 256)) return fail(bad, "%s: the workspace is not aligned to 256 bytes", kName);
    return Status::kOk;
}

}  // namespace mxc
