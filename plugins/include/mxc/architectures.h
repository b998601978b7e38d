// Which GPUs this library holds machine code for.
#pragma once

#include <cstdint>

#include "mxc/types.h"

namespace mxc {

// The architectures given to the build, as in "80,86,90a".
const char* builtArchitectures() noexcept;

// True where code in the list `architectures` runs on a GPU of `compute_capability` (10 * major + minor): the same
// major number and no smaller minor one, and exactly the same number for those with a suffix ("90a").
bool architectureRuns(const char* architectures, int32_t compute_capability) noexcept;

// kOk where this library runs on the calling thread's current device, else kArchitecture (or kCuda: no device, no
// driver); the text starts with `op`.
Status checkDevice(const char* op) noexcept;

// What a launcher returned, with a clearer status where it is kCuda because this library does not run on the device at
// all. Launchers check their arguments first, so this comes after them.
Status explainCudaFailure(Status status, const char* op) noexcept;

}  // namespace mxc
