#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "dispatch.cuh"
#include "lightning_prefill_sm90.h"
#include "mxc/launch.cuh"

namespace mxc {
namespace {

constexpr char kName[] = "lightning prefill";

// plan.kernel where the sm_90a kernel fits.
int32_t sm90Wanted() noexcept {
    const char* value = std::getenv("MXC_LIGHTNING_SM90");
    if (value == nullptr) return 0;
    return std::strcmp(value, "1") == 0 ? 1 : (std::strcmp(value, "2") == 0 ? 2 : 0);
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
        if (lightningSm90Fits(chosen, params.head_dim, facts.compute_capability)) chosen.kernel = sm90Wanted();
    }
    status = checkLightningPlan(params, chosen, facts.compute_capability);
    if (status != Status::kOk) return status;
    return chosen.kernel != 0 ? runLightningPrefillSm90(params, chosen, stream)
                              : runPrefillPortable(params, chosen, runner);
}

}  // namespace mxc
