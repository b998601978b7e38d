#include "checks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "moe_args.h"

namespace mxc {
namespace {

constexpr char kName[] = "moe";
constexpr auto kBad = Status::kInvalidArgument;
constexpr int32_t kMaxWidth = 1 << 20;

bool aligned(const void* pointer, uintptr_t bytes) noexcept {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

struct Range {
    const char* name;
    const void* begin;
    int64_t bytes;
    uintptr_t alignment;
};

bool overlap(const Range& a, const Range& b) noexcept {
    const auto first = reinterpret_cast<uintptr_t>(a.begin), second = reinterpret_cast<uintptr_t>(b.begin);
    return first < second + static_cast<uintptr_t>(b.bytes) && second < first + static_cast<uintptr_t>(a.bytes);
}

int64_t width(DType dtype) noexcept { return dtype == DType::kFloat32 ? 4 : (dtype == DType::kInt8 ? 1 : 2); }

int32_t localExperts(const MoeParams& params) noexcept {
    return params.local_experts == 0 ? params.experts : params.local_experts;
}

size_t roundUp(size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }

// Gives out consecutive parts of the workspace; with a null base it only counts.
struct Arena {
    char* base;
    size_t used = 0;
    template <class Element>
    Element* take(size_t count) noexcept {
        char* here = base == nullptr ? nullptr : base + used;
        used += roundUp(count * sizeof(Element));
        return reinterpret_cast<Element*>(here);
    }
};

// Problem shapes, pointers and strides (per expert) and CUTLASS' own tensor maps (per multiprocessor): far below this.
constexpr size_t kGroupedBytes = size_t{1} << 20;

// Lays out what every path needs, so that the size depends on nothing but shapes and types: whoever reserved the memory
// need not know which path a launch will take. The sm_90a path's gathered rows die before out_rows are written: they
// share memory.
size_t layOut(const MoeParams& params, int32_t tokens, char* base, MoeArgs& args) noexcept {
    const size_t pairs = static_cast<size_t>(tokens) * static_cast<size_t>(params.top_k);
    const size_t hidden = static_cast<size_t>(params.hidden), inner = static_cast<size_t>(params.inner);
    Arena arena{base};
    args.pair_weight = arena.take<float>(pairs);
    args.pair_expert = arena.take<int32_t>(pairs);
    args.pair_row = arena.take<int32_t>(pairs);
    args.row_token = arena.take<int32_t>(pairs);
    args.offsets = arena.take<int32_t>(static_cast<size_t>(localExperts(params)) + 1);
    args.inner_rows = arena.take<uint16_t>(pairs * inner);
    args.out_rows = arena.take<float>(pairs * hidden);
    if (moeSm90Fits(moeShape(params), 90)) {
        args.x_rows = reinterpret_cast<uint16_t*>(args.out_rows);
        args.grouped = arena.take<char>(kGroupedBytes);
        args.grouped_bytes = kGroupedBytes;
    }
    return arena.used;
}

}  // namespace

MoeShape moeShape(const MoeParams& params) noexcept {
    MoeShape shape;
    shape.tokens = params.tokens;
    shape.experts = params.experts;
    shape.top_k = params.top_k;
    shape.int8_weights = params.weight_dtype == DType::kInt8;
    shape.bfloat16 = params.dtype == DType::kBFloat16;
    return shape;
}

size_t moePieceWorkspace(const MoeParams& params, int32_t tokens) noexcept {
    MoeArgs args;
    return layOut(params, tokens, nullptr, args);
}

MoeArgs moePieceArgs(const MoeParams& params, int32_t first, int32_t tokens) noexcept {
    MoeArgs args;
    layOut(params, tokens, static_cast<char*>(params.workspace), args);
    const int64_t start = first;
    args.x = static_cast<const uint16_t*>(params.x_ND) + start * params.hidden;
    args.logits =
        static_cast<const char*>(params.router_logits_NE) + start * params.experts * width(params.router_dtype);
    args.fc1 = params.fc1_E2ID;
    args.fc2 = params.fc2_EDI;
    args.fc1_scale = params.fc1_scale_E2I;
    args.fc2_scale = params.fc2_scale_ED;
    args.out = static_cast<uint16_t*>(params.out_ND) + start * params.hidden;
    args.tokens = tokens;
    args.hidden = params.hidden;
    args.inner = params.inner;
    args.experts = params.experts;
    args.top_k = params.top_k;
    args.first_local = params.first_local;
    args.local_experts = localExperts(params);
    args.normalize = params.normalize ? 1 : 0;
    args.router_dtype = static_cast<int32_t>(params.router_dtype);
    args.scale_dtype = static_cast<int32_t>(params.scale_dtype);
    return args;
}

Status checkMoeShape(const MoeParams& params) noexcept {
    if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
        return fail(Status::kUnsupported, "%s: dtype %d is not supported; use fp16 or bf16", kName,
                    static_cast<int>(params.dtype));
    }
    if (params.router_dtype != DType::kFloat32 && params.router_dtype != DType::kFloat16 &&
        params.router_dtype != DType::kBFloat16) {
        return fail(Status::kUnsupported, "%s: router logits of dtype %d are not supported; use fp32, fp16 or bf16",
                    kName, static_cast<int>(params.router_dtype));
    }
    const bool int8 = params.weight_dtype == DType::kInt8;
    if (!int8 && params.weight_dtype != params.dtype) {
        return fail(Status::kUnsupported,
                    "%s: weights of dtype %d with dtype %d are not supported; use the same or int8", kName,
                    static_cast<int>(params.weight_dtype), static_cast<int>(params.dtype));
    }
    if (int8 && params.scale_dtype != DType::kFloat32 && params.scale_dtype != params.dtype) {
        return fail(Status::kUnsupported, "%s: scales of dtype %d are not supported; use fp32 or the tokens' dtype",
                    kName, static_cast<int>(params.scale_dtype));
    }
    if (params.tokens < 0) return fail(kBad, "%s: tokens %d is negative", kName, params.tokens);
    if (params.experts < 1 || params.experts > kMoeMaxExperts) {
        return fail(kBad, "%s: %d experts; 1 to %d are supported", kName, params.experts, kMoeMaxExperts);
    }
    if (params.top_k < 1 || params.top_k > kMoeMaxTopK) {
        return fail(kBad, "%s: top_k %d; 1 to %d are supported", kName, params.top_k, kMoeMaxTopK);
    }
    if (params.top_k > params.experts) {
        return fail(kBad, "%s: top_k %d is larger than the number of experts %d", kName, params.top_k, params.experts);
    }
    if (params.first_local < 0 || params.local_experts < 0 ||
        int64_t{params.first_local} + localExperts(params) > params.experts) {
        return fail(kBad, "%s: local experts %d to %lld are out of range; there are %d", kName, params.first_local,
                    static_cast<long long>(params.first_local) + localExperts(params) - 1, params.experts);
    }
    const int32_t multiple = int8 ? 16 : 8;
    for (const auto& [name, value] :
         {std::pair<const char*, int32_t>{"hidden", params.hidden}, {"inner", params.inner}}) {
        if (value < multiple || value % multiple != 0 || value > kMaxWidth) {
            return fail(kBad, "%s: %s %d is not supported; use a multiple of %d up to %d", kName, name, value, multiple,
                        kMaxWidth);
        }
    }
    return Status::kOk;
}

Status checkMoePointers(const MoeParams& params) noexcept {
    if (params.tokens == 0) return Status::kOk;
    const int64_t tokens = params.tokens, hidden = params.hidden, inner = params.inner, local = localExperts(params);
    const int64_t weight = local * hidden * inner * width(params.weight_dtype);
    const auto router = static_cast<uintptr_t>(width(params.router_dtype));
    const auto scale = static_cast<uintptr_t>(width(params.scale_dtype));
    const bool int8 = params.weight_dtype == DType::kInt8;
    const Range ranges[] = {
        {"out", params.out_ND, tokens * hidden * 2, 16},
        {"x", params.x_ND, tokens * hidden * 2, 16},
        {"router_logits", params.router_logits_NE, tokens * params.experts * width(params.router_dtype), router},
        {"fc1", params.fc1_E2ID, 2 * weight, 16},
        {"fc2", params.fc2_EDI, weight, 16},
        {"fc1_scale", params.fc1_scale_E2I, local * 2 * inner * width(params.scale_dtype), scale},
        {"fc2_scale", params.fc2_scale_ED, local * hidden * width(params.scale_dtype), scale},
    };
    const Range workspace{"workspace", params.workspace, static_cast<int64_t>(params.workspace_bytes), 256};
    const int count = int8 ? 7 : 5;
    for (int i = 0; i < count; ++i) {
        const Range& range = ranges[i];
        if (range.begin == nullptr) return fail(kBad, "%s: %s is null", kName, range.name);
        if (!aligned(range.begin, range.alignment)) {
            return fail(kBad, "%s: %s is not aligned to %d bytes", kName, range.name,
                        static_cast<int>(range.alignment));
        }
        if (i > 0 && overlap(ranges[0], range)) return fail(kBad, "%s: out overlaps %s", kName, range.name);
        if (workspace.begin != nullptr && overlap(workspace, range)) {
            return fail(kBad, "%s: the workspace overlaps %s", kName, range.name);
        }
    }
    if (!aligned(params.workspace, workspace.alignment))
        return fail(kBad, "%s: the workspace is not aligned to 256 bytes", kName);
    const size_t needed =
        moePieceWorkspace(params, planMoe(moeShape(params), 0, false).piece_tokens);  // of any GPU's plan
    const size_t given = params.workspace == nullptr ? 0 : params.workspace_bytes;
    if (given < needed) {
        return fail(Status::kWorkspace, "%s: the workspace has %zu bytes, %zu are needed", kName, given, needed);
    }
    return Status::kOk;
}

Status checkMoePlan(const MoeParams& params, const MoePlan& plan, int32_t compute_capability) noexcept {
    if (compute_capability < 80) {
        return fail(Status::kArchitecture, "%s: compute capability %d.%d is too old; 8.0 or later is needed", kName,
                    compute_capability / 10, compute_capability % 10);
    }
    if (plan.path == MoePath::kSm90 && !moeSm90Fits(moeShape(params), compute_capability)) {
        return fail(Status::kArchitecture,
                    "%s: the sm_90a kernels need compute capability 9.0, bf16 tokens and bf16 weights", kName);
    }
    return Status::kOk;
}

MoeEnvironment moeEnvironment() noexcept {
    MoeEnvironment environment;
    const char* sm90 = std::getenv("MXC_MOE_SM90");
    environment.sm90 = sm90 != nullptr && std::strcmp(sm90, "1") == 0;
    const char* path = std::getenv("MXC_MOE_PATH");
    if (path == nullptr || *path == '\0') return environment;
    environment.path_named = true;
    environment.path_known = moePathFromName(path, environment.path);
    return environment;
}

Status chooseMoePlan(const MoeParams& params, const MoeEnvironment& environment, int32_t compute_capability,
                     MoePlan& plan) noexcept {
    const MoeShape shape = moeShape(params);
    if (environment.path_named && !environment.path_known) {
        return fail(kBad, "%s: MXC_MOE_PATH names no path; use stream, grouped64, grouped128 or sm90", kName);
    }
    plan = planMoe(shape, compute_capability, environment.sm90);
    if (environment.path_named) plan.path = environment.path;
    return checkMoePlan(params, plan, compute_capability);
}

size_t moeWorkspaceBytes(const MoeParams& params) noexcept {
    if (checkMoeShape(params) != Status::kOk || params.tokens == 0) return 0;
    return moePieceWorkspace(params, std::min(params.tokens, kMoePieceTokens));
}

}  // namespace mxc
