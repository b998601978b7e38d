// What launchMoe refuses before it touches CUDA. Host only, so that every refusal is tested where there is no GPU.
#pragma once

#include "dispatch.h"
#include "moe.h"

namespace mxc {

// kOk, or the first thing that is wrong with sizes and types; the text is in lastError().
Status checkMoeShape(const MoeParams& params) noexcept;

// The same for pointers and the workspace: null, alignment, overlap, size. Call after checkMoeShape; nothing is asked
// of zero tokens.
Status checkMoePointers(const MoeParams& params) noexcept;

// Whether the plan fits the GPU.
Status checkMoePlan(const MoeParams& params, const MoePlan& plan, int32_t compute_capability) noexcept;

// The variables that moe.h describes.
struct MoeEnvironment {
    bool sm90 = false;
    bool path_named = false;
    bool path_known = false;
    MoePath path = MoePath::kStream;
};
MoeEnvironment moeEnvironment() noexcept;

// Plans, and checks the plan against the GPU.
Status chooseMoePlan(const MoeParams& params, const MoeEnvironment& environment, int32_t compute_capability,
                     MoePlan& plan) noexcept;

}  // namespace mxc
