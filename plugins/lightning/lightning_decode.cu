#include "checks.h"
#include "dispatch.cuh"
#include "mxc/launch.cuh"

namespace mxc {

Status launchLightningDecode(const LightningParams& params, cudaStream_t stream) noexcept {
    constexpr char kName[] = "lightning decode";
    Status status = checkLightning(params, LightningOp::kDecode);
    if (status != Status::kOk) return status;
    CudaRunner runner{kName, stream};
    if (params.batch == 0 || params.tokens == 0) return runNoTokens(params, runner);

    DeviceFacts facts;
    status = deviceFacts(kName, facts);
    if (status != Status::kOk) return status;
    return runDecode(params, planLightningDecode(params.batch, params.heads, params.head_dim, facts.sm_count), runner);
}

}  // namespace mxc
