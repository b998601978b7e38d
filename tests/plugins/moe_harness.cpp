// A C interface over the planner, the launcher's checks and the emulated kernels; built by tests/plugins/moe_host.py
// with an ordinary C++ compiler.
#include <vector>

#include "moe/checks.h"
#include "moe/run.cuh"
#include "moe/sm90_steps.cuh"
#include "mxc_harness.h"

namespace {

// One warp of the GEMM's epilogue: 16 rows and 256 columns of the sums, NaN outside the matrix.
struct GatedTile {
    struct Args {
        const float* sums;
        uint16_t* out;
        int64_t stride;
        int rows, columns;
        int blocks() const { return (columns + 255) / 256; }
    };
    static constexpr int kThreads = 32;
    static constexpr int kSharedBytes = 0;
    static void run(const Args& args, char*) {
        const int block = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
        const int row0 = block / args.blocks() * 16 + lane / 4, column0 = block % args.blocks() * 256;
        const auto sum = [&](int i) {
            const int row = row0 + 8 * (i % 4 / 2), column = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            return row < args.rows && column < args.columns
                       ? args.sums[static_cast<int64_t>(row) * args.columns + column]
                       : NAN;
        };
        mxc::storeGated<mxc::BFloat16, 32>(sum, args.out, args.stride, row0, args.rows, column0 / 2, args.columns / 2);
    }
};

struct MoeRunner : mxc::EmulatedRunner {
    // The steps around the sm_90a path's GEMMs and fc1's epilogue are emulated; the GEMMs, which are CUTLASS', are
    // plain loops here.
    mxc::Status sm90(const mxc::MoeArgs& args) {
        return mxc::runMoeSm90Steps(args, *this, [&](int product, const mxc::GroupedProblem& problem) {
            mxc::Status status = mxc::Status::kOk;
            for (int expert = 0; expert < args.local_experts && status == mxc::Status::kOk; ++expert) {
                const auto shape = problem.shapes[expert];
                if (product == 1) {
                    multiply(problem, expert, static_cast<float*>(problem.d[expert]));
                    continue;
                }
                std::vector<float> sums(static_cast<size_t>(shape.m) * static_cast<size_t>(shape.n));
                multiply(problem, expert, sums.data());
                const GatedTile::Args tile{sums.data(), static_cast<uint16_t*>(problem.d[expert]),
                                           problem.stride_d[expert], shape.m, shape.n};
                status = run<GatedTile>(static_cast<unsigned>((shape.m + 15) / 16 * tile.blocks()), tile);
            }
            return status;
        });
    }
    static void multiply(const mxc::GroupedProblem& problem, int expert, float* out) {
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
                out[static_cast<int64_t>(m) * shape.n + n] = sum;
            }
        }
    }
};

}  // namespace

extern "C" {

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
    MoeRunner runner{{schedule}};
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
    MoeRunner runner{{schedule}};
    return static_cast<int>(mxc::runMoeRoute(args, small != 0, runner));
}
}
