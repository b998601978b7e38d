// The sm_90a prefill: launched by lightning_prefill.cu for plans with kernel 1.
#pragma once

#include "lightning_attention.h"

namespace mxc {

// Arguments and plan checked before. kArchitecture where the library was built without sm_90a.
Status runLightningPrefillSm90(const LightningParams& params, const LightningPlan& plan, cudaStream_t stream) noexcept;

}  // namespace mxc
