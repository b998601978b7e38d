// Which kernels a launch is made of, and their grids. The runner starts one kernel: on a GPU (mxc/launch.cuh) or in the
// emulator, so both take the same path from a plan to the blocks. The arguments have been checked (checks.h).
#pragma once

#include "combine.cuh"
#include "grouped.cuh"
#include "route.cuh"
#include "stream.cuh"

namespace mxc {

template <bool kGated>
ExpertGemmArgs expertGemmArgs(const MoeArgs& args) noexcept {
    ExpertGemmArgs gemm;
    gemm.weights = kGated ? args.fc1 : args.fc2;
    gemm.scales = kGated ? args.fc1_scale : args.fc2_scale;
    gemm.input = kGated ? args.x : args.inner_rows;
    gemm.row_token = kGated ? args.row_token : nullptr;
    gemm.offsets = args.offsets;
    gemm.out = kGated ? static_cast<void*>(args.inner_rows) : static_cast<void*>(args.out_rows);
    gemm.m = kGated ? 2 * args.inner : args.hidden;
    gemm.k = kGated ? args.hidden : args.inner;
    gemm.experts = args.local_experts;
    gemm.scale_dtype = args.scale_dtype;
    return gemm;
}

// Most token tiles of `tile` rows that any routing gives.
inline unsigned mostTiles(const MoeArgs& args, int32_t tile) noexcept {
    const int32_t pairs = args.tokens * args.top_k;
    return static_cast<unsigned>(pairs / tile + (pairs < args.local_experts ? pairs : args.local_experts));
}

// fc1 with SwiGLU, then fc2. Explicitly instantiated in moe_stream_*.cu and moe_grouped_*.cu, to compile side by side.
template <class Element, bool kInt8, class Runner>
Status runMoeStream(const MoeArgs& args, Runner& runner) {
    const int32_t pairs = args.tokens * args.top_k;
    const auto active = static_cast<unsigned>(pairs < args.local_experts ? pairs : args.local_experts);
    const auto first = expertGemmArgs<true>(args);
    const auto second = expertGemmArgs<false>(args);
    const unsigned first_grid = active * static_cast<unsigned>((first.m + 15) / 16);
    const unsigned second_grid = active * static_cast<unsigned>((second.m + 15) / 16);
    if (args.tokens <= 8) {
        const Status status = runner.template run<MoeStream<Element, kInt8, true, 8>>(first_grid, first);
        if (status != Status::kOk) return status;
        return runner.template run<MoeStream<Element, kInt8, false, 8>>(second_grid, second);
    }
    const Status status = runner.template run<MoeStream<Element, kInt8, true, 32>>(first_grid, first);
    if (status != Status::kOk) return status;
    return runner.template run<MoeStream<Element, kInt8, false, 32>>(second_grid, second);
}

template <class Element, bool kInt8, int kTokens, class Runner>
Status runMoeGrouped(const MoeArgs& args, Runner& runner) {
    const auto first = expertGemmArgs<true>(args);
    const auto second = expertGemmArgs<false>(args);
    const unsigned tiles = mostTiles(args, kTokens);
    const Status status = runner.template run<MoeGrouped<Element, kInt8, true, kTokens>>(
        tiles * static_cast<unsigned>((first.m + 127) / 128), first);
    if (status != Status::kOk) return status;
    return runner.template run<MoeGrouped<Element, kInt8, false, kTokens>>(
        tiles * static_cast<unsigned>((second.m + 127) / 128), second);
}

template <class Runner>
Status runMoeRoute(const MoeArgs& args, bool small, Runner& runner) {
    if (small) return runner.template run<MoeSmallRoute>(1, args);
    const Status status = runner.template run<MoeRouter>(static_cast<unsigned>((args.tokens + 7) / 8), args);
    if (status != Status::kOk) return status;
    return runner.template run<MoeSort>(static_cast<unsigned>(args.local_experts), args);
}

template <class Element, class Runner>
Status runMoeCombine(const MoeArgs& args, Runner& runner) {
    const int columns = MoeCombine<Element>::kColumns;
    return runner.template run<MoeCombine<Element>>(
        static_cast<unsigned>(args.tokens) * static_cast<unsigned>((args.hidden + columns - 1) / columns), args);
}

template <class Element, bool kInt8, class Runner>
Status runMoeExperts(const MoeArgs& args, MoePath path, Runner& runner) {
    switch (path) {
        case MoePath::kStream:
            return runMoeStream<Element, kInt8>(args, runner);
        case MoePath::kGrouped64:
            return runMoeGrouped<Element, kInt8, 64>(args, runner);
        case MoePath::kGrouped128:
            return runMoeGrouped<Element, kInt8, 128>(args, runner);
        case MoePath::kSm90:
            break;
    }
    return runner.sm90(args);
}

template <class Element, class Runner>
Status runMoeElement(const MoeParams& params, const MoePlan& plan, Runner& runner) {
    for (int32_t first = 0; first < params.tokens; first += plan.piece_tokens) {
        const int32_t left = params.tokens - first;
        const MoeArgs args = moePieceArgs(params, first, left < plan.piece_tokens ? left : plan.piece_tokens);
        Status status = runMoeRoute(args, plan.small_route, runner);
        if (status == Status::kOk) {
            status = params.weight_dtype == DType::kInt8 ? runMoeExperts<Element, true>(args, plan.path, runner)
                                                         : runMoeExperts<Element, false>(args, plan.path, runner);
        }
        if (status == Status::kOk) status = runMoeCombine<Element>(args, runner);
        if (status != Status::kOk) return status;
    }
    return Status::kOk;
}

template <class Runner>
Status runMoe(const MoeParams& params, const MoePlan& plan, Runner& runner) {
    return params.dtype == DType::kFloat16 ? runMoeElement<Half>(params, plan, runner)
                                           : runMoeElement<BFloat16>(params, plan, runner);
}

}  // namespace mxc
