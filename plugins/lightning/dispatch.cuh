// Which kernels a launch is made of, and their grids. The runner starts one kernel: on a GPU (mxc/launch.cuh) or in the
// emulator, so both take the same path from a plan to the blocks. The arguments have been checked (checks.h).
#pragma once

#include "decode.cuh"
#include "lightning_attention.h"
#include "prefill_portable.cuh"
#include "prefill_sm90.cuh"
#include "segment_scan.cuh"

namespace mxc {

inline PrefillArgs prefillArgs(const LightningParams& params, const LightningPlan& plan) noexcept {
    PrefillArgs args;
    args.q = static_cast<const uint16_t*>(params.q_BTHK);
    args.k = static_cast<const uint16_t*>(params.k_BTHK);
    args.v = static_cast<const uint16_t*>(params.v_BTHV);
    args.out = static_cast<uint16_t*>(params.out_BTHV);
    args.state_in = params.state_in_PHKV;
    args.state_out = params.state_out_PHKV;
    args.slots = params.slots_B;
    args.log_decay = params.log_decay_BTH;
    args.slopes = params.slopes_H;
    args.lengths = params.lengths_B;
    args.batch = params.batch;
    args.tokens = params.tokens;
    args.heads = params.heads;
    args.slot_count = params.slots == 0 ? params.batch : params.slots;
    args.scale = params.scale;
    args.segments = plan.segments;
    args.segment_chunks = plan.segment_chunks;
    if (plan.segments > 1) {
        // The states first; the decays follow in the last part of the workspace.
        const size_t pieces =
            static_cast<size_t>(params.batch) * static_cast<size_t>(params.heads) * static_cast<size_t>(plan.segments);
        const size_t decay_bytes = (pieces * sizeof(float) + 255) / 256 * 256;
        const size_t bytes = lightningWorkspaceBytes(plan, params.batch, params.heads, params.head_dim);
        args.segment_states = static_cast<float*>(params.workspace);
        args.segment_decays = reinterpret_cast<float*>(static_cast<char*>(params.workspace) + (bytes - decay_bytes));
    }
    return args;
}

template <int kDim, class Runner>
Status runCopyStates(const LightningParams& params, Runner& runner) {
    if (params.state_in_PHKV == params.state_out_PHKV) return Status::kOk;
    return runner.template run<CopyStates<kDim>>(static_cast<unsigned>(params.batch * params.heads),
                                                 prefillArgs(params, {}));
}

// T == 0 or B == 0: nothing to compute, only states to carry over.
template <class Runner>
Status runNoTokens(const LightningParams& params, Runner& runner) {
    if (params.batch == 0) return Status::kOk;
    return params.head_dim == 64 ? runCopyStates<64>(params, runner) : runCopyStates<128>(params, runner);
}

// The segments' initial states, where there are several: summaries, then the scan.
template <class Element, int kDim, int kSplits, class Runner>
Status runSegments(const LightningParams& params, const LightningPlan& plan, Runner& runner) {
    if (plan.segments <= 1) return Status::kOk;
    const PrefillArgs args = prefillArgs(params, plan);
    const unsigned rows = static_cast<unsigned>(params.batch * params.heads);
    const Status status = runner.template run<PrefillPortable<Element, kDim, kSplits, true>>(
        rows * static_cast<unsigned>((plan.segments - 1) * kSplits), args);
    if (status != Status::kOk) return status;
    return runner.template run<SegmentScan<kDim>>(rows * static_cast<unsigned>(SegmentScan<kDim>::kBlocksPerHead),
                                                  args);
}

template <class Element, int kDim, int kSplits, class Runner>
Status runPrefill(const LightningParams& params, const LightningPlan& plan, Runner& runner) {
    const Status status = runSegments<Element, kDim, kSplits>(params, plan, runner);
    if (status != Status::kOk) return status;
    const unsigned rows = static_cast<unsigned>(params.batch * params.heads);
    return runner.template run<PrefillPortable<Element, kDim, kSplits, false>>(
        rows * static_cast<unsigned>(plan.segments * kSplits), prefillArgs(params, plan));
}

template <class Element, class Runner>
Status runPrefillElement(const LightningParams& params, const LightningPlan& plan, Runner& runner) {
    if (params.head_dim == 64) return runPrefill<Element, 64, 1>(params, plan, runner);
    if (plan.value_splits == 2) return runPrefill<Element, 128, 2>(params, plan, runner);
    return runPrefill<Element, 128, 1>(params, plan, runner);
}

template <class Runner>
Status runPrefillPortable(const LightningParams& params, const LightningPlan& plan, Runner& runner) {
    return params.dtype == DType::kFloat16 ? runPrefillElement<Half>(params, plan, runner)
                                           : runPrefillElement<BFloat16>(params, plan, runner);
}

// The sm_90a kernels (through `hopper`, which also makes the tensor maps), with the scan between them (through
// `runner`). head_dim 128 only.
template <class Element, class Runner, class HopperRunner>
Status runPrefillSm90Element(const LightningParams& params, const LightningPlan& plan, Runner& runner,
                             HopperRunner& hopper) {
    const unsigned rows = static_cast<unsigned>(params.batch * params.heads);
    const bool cluster = plan.value_splits == 2 && plan.kernel == 1;
    PrefillSm90Args args{};
    args.prefill = prefillArgs(params, plan);
    Status status = hopper.rowMap(args.v, args.prefill.v, params, kLightningChunk);
    if (status == Status::kOk) status = hopper.rowMap(args.out, args.prefill.out, params, kLightningChunk);
    if (status == Status::kOk && plan.segments > 1) {
        status = hopper.rowMap(args.k, args.prefill.k, params, kLightningChunk);
        args.q = args.k;  // not read
        if (status == Status::kOk) {
            status = hopper.template run<PrefillSm90<Element, 1, Sm90Form::kSummary>>(
                rows * static_cast<unsigned>(plan.segments - 1), args);
        }
        if (status == Status::kOk) {
            status = runner.template run<SegmentScan<128>>(
                rows * static_cast<unsigned>(SegmentScan<128>::kBlocksPerHead), args.prefill);
        }
    }
    const int box_tokens = cluster ? kLightningChunk / 2 : kLightningChunk;
    if (status == Status::kOk) status = hopper.rowMap(args.q, args.prefill.q, params, box_tokens);
    if (status == Status::kOk) status = hopper.rowMap(args.k, args.prefill.k, params, box_tokens);
    if (status != Status::kOk) return status;
    const unsigned grid = rows * static_cast<unsigned>(plan.segments * plan.value_splits);
    if (cluster) return hopper.template run<PrefillSm90<Element, 2, Sm90Form::kCluster>>(grid, args);
    if (plan.value_splits == 2) return hopper.template run<PrefillSm90<Element, 2, Sm90Form::kApart>>(grid, args);
    return hopper.template run<PrefillSm90<Element, 1, Sm90Form::kApart>>(grid, args);
}

template <class Runner, class HopperRunner>
Status runPrefillSm90(const LightningParams& params, const LightningPlan& plan, Runner& runner, HopperRunner& hopper) {
    return params.dtype == DType::kFloat16 ? runPrefillSm90Element<Half>(params, plan, runner, hopper)
                                           : runPrefillSm90Element<BFloat16>(params, plan, runner, hopper);
}

template <class Element, int kDim, class Runner>
Status runDecodeSplits(const LightningParams& params, int32_t splits, Runner& runner) {
    const PrefillArgs args = prefillArgs(params, {});
    const unsigned rows = static_cast<unsigned>(params.batch * params.heads);
    if (splits == 4) return runner.template run<Decode<Element, kDim, 4>>(rows * 4, args);
    return runner.template run<Decode<Element, kDim, 1>>(rows, args);
}

template <class Element, class Runner>
Status runDecodeElement(const LightningParams& params, int32_t splits, Runner& runner) {
    return params.head_dim == 64 ? runDecodeSplits<Element, 64>(params, splits, runner)
                                 : runDecodeSplits<Element, 128>(params, splits, runner);
}

template <class Runner>
Status runDecode(const LightningParams& params, int32_t splits, Runner& runner) {
    switch (params.dtype) {
        case DType::kFloat32:
            return runDecodeElement<float>(params, splits, runner);
        case DType::kFloat16:
            return runDecodeElement<Half>(params, splits, runner);
        default:
            return runDecodeElement<BFloat16>(params, splits, runner);
    }
}

}  // namespace mxc
