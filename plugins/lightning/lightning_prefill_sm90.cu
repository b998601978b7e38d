#include "lightning_prefill_sm90.h"

namespace mxc {

Status runLightningPrefillSm90(const LightningParams&, const LightningPlan&, cudaStream_t) noexcept {
    return fail(Status::kArchitecture, "lightning prefill: this library holds no sm_90a kernel");
}

}  // namespace mxc
