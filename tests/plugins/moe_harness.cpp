// A C interface over the planner, the launcher's checks and the emulated kernels; built by tests/plugins/moe_host.py
// with an ordinary C++ compiler.
#include <cstdarg>
#include <cstdio>

#include "moe/checks.h"
#include "moe/run.cuh"
#include "moe/sm90_steps.cuh"

namespace {

thread_local char text[512] = "";

struct EmulatedRunner {
    int schedule;
    template <class Kernel>
    mxc::Status run(unsigned grid, const typename Kernel::Args& args) {
        try {
            mxc::emu::launch<Kernel>(grid, args, schedule);
        } catch (const std::exception& error) {
            return mxc::fail(mxc::Status::kCuda, "%s", error.what());
        }
        return mxc::Status::kOk;
    }
    // The steps around the sm_90a path's GEMMs are emulated; the GEMMs, which are CUTLASS', are plain loops here.
    mxc::Status sm90(const mxc::MoeArgs& args) {
        return mxc::runMoeSm90Steps<mxc::BFloat16>(args, *this, [&](int product, const mxc::GroupedProblem& problem) {
            for (int expert = 0; expert < args.local_experts; ++expert) multiply(problem, expert, product == 0);
            return mxc::Status::kOk;
        });
    }
    static void multiply(const mxc::GroupedProblem& problem, int expert, bool round) {
        const auto shape = problem.shapes[expert];
        const auto* a = static_cast<const uint16_t*>(problem.a[expert]);
        const auto* b = static_cast<const uint16_t*>(problem.b[expert]);
        for (int m = 0; m < shape.m; ++m) {
            for (int n = 0; n < shape.n; ++n) {
                float sum = 0.0f;
                for (int k = 0; k < shape.k; ++k) {
                    sum += mxc::unpackLow<mxc::BFloat16>(a[m * problem.stride_a[expert] + k]) *
                           mxc::unpackLow<mxc::BFloat16>(b[n * problem.stride_b[expert] + k]);
                }
                const int64_t at = m * problem.stride_d[expert] + n;
                if (round) {
                    static_cast<uint16_t*>(problem.d[expert])[at] = mxc::roundTo<mxc::BFloat16>(sum);
                } else {
                    static_cast<float*>(problem.d[expert])[at] = sum;
                }
            }
        }
    }
};

}  // namespace

namespace mxc {

const char* lastError() noexcept { return text; }

Status fail(Status status, const char* format, ...) noexcept {
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return status;
}

}  // namespace mxc

extern "C" {

const char* host_last_error() { return text; }
size_t host_params_bytes() { return sizeof(mxc::MoeParams); }

// path, pieces, piece_tokens, small_route
void host_plan(int tokens, int experts, int top_k, int int8, int bfloat16, int capability, int sm90, int* out4) {
    mxc::MoeShape shape;
    shape.tokens = tokens;
    shape.experts = experts;
    shape.top_k = top_k;
    shape.int8_weights = int8 != 0;
    shape.bfloat16 = bfloat16 != 0;
    const mxc::MoePlan plan = mxc::planMoe(shape, capability, sm90 != 0);
    out4[0] = static_cast<int>(plan.path);
    out4[1] = plan.pieces;
    out4[2] = plan.piece_tokens;
    out4[3] = plan.small_route ? 1 : 0;
}

size_t host_workspace(const mxc::MoeParams* params) { return mxc::moeWorkspaceBytes(*params); }

// As launchMoe up to the kernels, for a GPU of this capability.
int host_check(const mxc::MoeParams* params, int capability) {
    mxc::Status status = mxc::checkMoeShape(*params);
    if (status == mxc::Status::kOk) status = mxc::checkMoePointers(*params);
    if (status != mxc::Status::kOk || params->tokens == 0) return static_cast<int>(status);
    mxc::MoePlan plan;
    return static_cast<int>(mxc::chooseMoePlan(*params, mxc::moeEnvironment(), capability, plan));
}

// As launchMoe, on the CPU; in pieces of so many tokens where piece_tokens is not 0.
int host_moe(const mxc::MoeParams* params, int piece_tokens, int schedule) {
    mxc::Status status = mxc::checkMoeShape(*params);
    if (status == mxc::Status::kOk) status = mxc::checkMoePointers(*params);
    if (status != mxc::Status::kOk || params->tokens == 0) return static_cast<int>(status);
    mxc::MoePlan plan;
    status = mxc::chooseMoePlan(*params, mxc::moeEnvironment(), 90, plan);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    if (piece_tokens > 0) {
        plan.piece_tokens = piece_tokens;
        plan.pieces = (params->tokens + piece_tokens - 1) / piece_tokens;
    }
    EmulatedRunner runner{schedule};
    return static_cast<int>(mxc::runMoe(*params, plan, runner));
}

// Router and sort alone. The arrays are as in moe_args.h.
int host_route(const mxc::MoeParams* params, int small, int schedule, float* pair_weight, int* pair_expert,
               int* pair_row, int* row_token, int* offsets) {
    const mxc::Status status = mxc::checkMoeShape(*params);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    mxc::MoeArgs args = mxc::moePieceArgs(*params, 0, params->tokens);
    args.pair_weight = pair_weight;
    args.pair_expert = pair_expert;
    args.pair_row = pair_row;
    args.row_token = row_token;
    args.offsets = offsets;
    EmulatedRunner runner{schedule};
    return static_cast<int>(mxc::runMoeRoute(args, small != 0, runner));
}
}
