#include "mxc/architectures.h"

#include <cuda_runtime_api.h>

#include <cstdlib>

#ifndef MXC_ARCHS
#error "MXC_ARCHS is not defined: build with plugins/CMakeLists.txt"
#endif

namespace mxc {

const char* builtArchitectures() noexcept { return MXC_ARCHS; }

bool architectureRuns(const char* architectures, int32_t compute_capability) noexcept {
    const char* cursor = architectures;
    while (*cursor != '\0') {
        char* end = nullptr;
        const long built = std::strtol(cursor, &end, 10);
        if (end == cursor) return false;
        const bool exact = *end == 'a' || *end == 'f';
        if (exact) ++end;
        const bool same_major = built / 10 == compute_capability / 10;
        if (exact ? built == compute_capability : same_major && built <= compute_capability) return true;
        cursor = *end == ',' ? end + 1 : end;
    }
    return false;
}

Status checkDevice(const char* op) noexcept {
    int device = 0;
    int major = 0;
    int minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) {
        cudaGetLastError();  // later calls must not see it
        return fail(Status::kCuda, "%s: no usable GPU: %s", op, cudaGetErrorString(error));
    }
    if (!architectureRuns(builtArchitectures(), 10 * major + minor)) {
        return fail(Status::kArchitecture,
                    "%s: this library was built for %s; the GPU has compute capability %d.%d; build it again with that "
                    "architecture",
                    op, builtArchitectures(), major, minor);
    }
    return Status::kOk;
}

Status explainCudaFailure(Status status, const char* op) noexcept {
    if (status != Status::kCuda) return status;
    const Status device = checkDevice(op);
    return device == Status::kOk ? status : device;
}

}  // namespace mxc
