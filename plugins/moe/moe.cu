#include "checks.h"
#include "moe.h"
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_STREAM(extern, BFloat16, false)
MXC_MOE_STREAM(extern, BFloat16, true)
MXC_MOE_STREAM(extern, Half, false)
MXC_MOE_STREAM(extern, Half, true)
MXC_MOE_GROUPED(extern, BFloat16, false)
MXC_MOE_GROUPED(extern, BFloat16, true)
MXC_MOE_GROUPED(extern, Half, false)
MXC_MOE_GROUPED(extern, Half, true)

Status launchMoe(const MoeParams& params, cudaStream_t stream) noexcept {
    Status status = checkMoeShape(params);
    if (status == Status::kOk) status = checkMoePointers(params);
    if (status != Status::kOk || params.tokens == 0) return status;

    DeviceFacts facts;
    status = deviceFacts("moe", facts);
    if (status != Status::kOk) return status;
    MoePlan plan;
    status = chooseMoePlan(params, moeEnvironment(), facts.compute_capability, plan);
    if (status != Status::kOk) return status;
    MoeRunner runner{{"moe", stream}, facts.sm_count};
    return runMoe(params, plan, runner);
}

}  // namespace mxc
