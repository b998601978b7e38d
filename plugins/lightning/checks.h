// What a launcher refuses before it touches CUDA. Host only, so that every refusal is tested where there is no GPU.
#pragma once

#include "lightning_attention.h"

namespace mxc {

enum class LightningOp { kPrefill, kDecode };

// kOk, or the first thing that is wrong with the arguments; the text is in lastError().
Status checkLightning(const LightningParams& params, LightningOp op) noexcept;

// Whether `plan` covers params.tokens with no empty segment, has kernels, and the workspace holds it.
Status checkLightningPlan(const LightningParams& params, const LightningPlan& plan,
                          int32_t compute_capability) noexcept;

}  // namespace mxc
