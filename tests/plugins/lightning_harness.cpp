// A C interface over the planner, the launchers' checks and the emulated kernels; built by
// tests/plugins/lightning_host.py with an ordinary C++ compiler.
#include "lightning/checks.h"
#include "lightning/dispatch.cuh"
#include "lightning/row_boxes.h"
#include "mxc_harness.h"

namespace {

struct HopperRunner : mxc::EmulatedRunner {
    mxc::Status rowMap(mxc::TensorMap& map, const uint16_t* rows, const mxc::LightningParams& params, int tokens) {
        const mxc::RowBoxes boxes = mxc::rowBoxes(params, tokens);
        map.base = reinterpret_cast<char*>(const_cast<uint16_t*>(rows));
        map.stride[0] = 2;
        for (int i = 0; i < 4; ++i) {
            map.size[i] = static_cast<int64_t>(boxes.size[i]);
            map.box[i] = static_cast<int>(boxes.box[i]);
            if (i > 0) map.stride[i] = static_cast<int64_t>(boxes.stride[i - 1]);
        }
        return mxc::Status::kOk;
    }
};

}  // namespace

extern "C" {

void host_plan(int batch, int tokens, int heads, int head_dim, int sm_count, int capability, int* out4) {
    const mxc::LightningPlan plan = mxc::planLightningPrefill(batch, tokens, heads, head_dim, sm_count, capability);
    out4[0] = plan.kernel;
    out4[1] = plan.value_splits;
    out4[2] = plan.segments;
    out4[3] = plan.segment_chunks;
}

size_t host_workspace(const int* plan4, int batch, int heads, int head_dim) {
    return mxc::lightningWorkspaceBytes({plan4[0], plan4[1], plan4[2], plan4[3]}, batch, heads, head_dim);
}

size_t host_max_workspace(int batch, int tokens, int heads, int head_dim, int sm_count, int capability) {
    return mxc::lightningMaxWorkspaceBytes(batch, tokens, heads, head_dim, sm_count, capability);
}

int host_plan_decode(int batch, int heads, int head_dim, int sm_count) {
    return mxc::planLightningDecode(batch, heads, head_dim, sm_count);
}

size_t host_params_bytes() { return sizeof(mxc::LightningParams); }

int host_check(const mxc::LightningParams* params, int decode) {
    return static_cast<int>(
        mxc::checkLightning(*params, decode ? mxc::LightningOp::kDecode : mxc::LightningOp::kPrefill));
}

int host_check_plan(const mxc::LightningParams* params, const int* plan4, int capability) {
    return static_cast<int>(mxc::checkLightningPlan(*params, {plan4[0], plan4[1], plan4[2], plan4[3]}, capability));
}

// As launchLightningPrefill, on the CPU.
int host_prefill(const mxc::LightningParams* params, const int* plan4, int schedule) {
    mxc::Status status = mxc::checkLightning(*params, mxc::LightningOp::kPrefill);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    mxc::EmulatedRunner runner{schedule};
    if (params->batch == 0 || params->tokens == 0) return static_cast<int>(mxc::runNoTokens(*params, runner));
    const mxc::LightningPlan plan{plan4[0], plan4[1], plan4[2], plan4[3]};
    status = mxc::checkLightningPlan(*params, plan, 90);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    HopperRunner hopper{{schedule}};
    return static_cast<int>(plan.kernel != 0 ? mxc::runPrefillSm90(*params, plan, runner, hopper)
                                             : mxc::runPrefillPortable(*params, plan, runner));
}

int host_decode(const mxc::LightningParams* params, int splits, int schedule) {
    const mxc::Status status = mxc::checkLightning(*params, mxc::LightningOp::kDecode);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    mxc::EmulatedRunner runner{schedule};
    if (params->batch == 0 || params->tokens == 0) return static_cast<int>(mxc::runNoTokens(*params, runner));
    return static_cast<int>(mxc::runDecode(*params, splits, runner));
}
}
