#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "dispatch.cuh"
#include "lightning_prefill_sm90.h"
#include "mxc/launch.cuh"

namespace mxc {
namespace {

constexpr char kName[] = "lightning prefill";

bool sm90Wanted() noexcept {
    const char* value = std::getenv("MXC_LIGHTNING_SM90");
    return value != nullptr && std::strcmp(value, "1") == 0;
}

}  // namespace

Status launchLightningPrefill(const LightningParams& params, const LightningPlan* plan, cudaStream_t stream) noexcept {
    Status status = checkLightning(params, LightningOp::kPrefill);
    if (status != Status::kOk) return status;
    CudaRunner runner{kName, stream};
    if (params.batch == 0 || params.tokens == 0) return runNoTokens(params, runner);

    DeviceFacts facts;
    status = deviceFacts(kName, facts);
    if (status != Status::kOk) return status;
    LightningPlan chosen;
    if (plan != nullptr) {
        chosen = *plan;
    } else {
        chosen = planLightningPrefill(params.batch, params.tokens, params.heads, params.head_dim, facts.sm_count,
                                      facts.compute_capability);
        if (sm90Wanted() && lightningSm90Fits(chosen, params.head_dim, facts.compute_capability)) chosen.kernel = 1;
    }
    status = checkLightningPlan(params, chosen, facts.compute_capability);
    if (status != Status::kOk) return status;
    return chosen.kernel == 1 ? runLightningPrefillSm90(params, chosen, stream)
                              : runPrefillPortable(params, chosen, runner);
}

}  // namespace mxc
