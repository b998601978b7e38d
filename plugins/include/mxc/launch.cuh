// Starts kernels written as a struct: Kernel::Args, kThreads, kMinBlocks, kSharedBytes and run(args, shared memory).
// Every failure becomes a Status with the kernel's name and the CUDA text in lastError().
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "mxc/types.h"

namespace mxc {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernelEntry(const __grid_constant__ typename Kernel::Args args) {
    extern __shared__ __align__(1024) char shared[];
    Kernel::run(args, shared);
}

inline Status cudaFailure(const char* name, const char* what, cudaError_t error) noexcept {
    const bool missing = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                         error == cudaErrorUnsupportedPtxVersion;
    return fail(missing ? Status::kArchitecture : Status::kCuda, "%s: %s: %s (%s)", name, what, cudaGetErrorName(error),
                missing ? "the library was not built for this GPU" : cudaGetErrorString(error));
}

// CTAs of a cluster: Kernel::kCluster where there is one, else 1.
template <class Kernel, class = void>
struct ClusterOf {
    static constexpr unsigned value = 1;
};
template <class Kernel>
struct ClusterOf<Kernel, decltype(static_cast<void>(Kernel::kCluster))> {
    static constexpr unsigned value = Kernel::kCluster;
};

struct DeviceFacts {
    int32_t sm_count = 0;
    int32_t compute_capability = 0;  // 10 * major + minor
};

inline Status deviceFacts(const char* name, DeviceFacts& facts) noexcept {
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&facts.sm_count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) {
        cudaGetLastError();  // not this launch's: later calls must not see it
        return cudaFailure(name, "asking the device", error);
    }
    facts.compute_capability = 10 * major + minor;
    return Status::kOk;
}

// Runs kernels one after another on a stream.
struct CudaRunner {
    const char* name;
    cudaStream_t stream;

    template <class Kernel>
    Status run(unsigned grid, const typename Kernel::Args& args) noexcept {
        if constexpr (Kernel::kSharedBytes > 48 * 1024) {
            static std::atomic<uint64_t> raised{0};  // devices on which this kernel may use its shared memory
            int device = 0;
            cudaError_t error = cudaGetDevice(&device);
            const uint64_t bit = uint64_t{1} << (device & 63);
            if (error == cudaSuccess && (device >= 64 || (raised.load(std::memory_order_relaxed) & bit) == 0)) {
                error = cudaFuncSetAttribute(kernelEntry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(Kernel::kSharedBytes));
                if (error == cudaSuccess) raised.fetch_or(bit, std::memory_order_relaxed);
            }
            if (error != cudaSuccess) {
                cudaGetLastError();
                return cudaFailure(name, "raising the shared memory limit", error);
            }
        }
        if constexpr (ClusterOf<Kernel>::value > 1) {
            cudaLaunchAttribute cluster;
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim = {ClusterOf<Kernel>::value, 1, 1};
            cudaLaunchConfig_t config = {};
            config.gridDim = grid;
            config.blockDim = static_cast<unsigned>(Kernel::kThreads);
            config.dynamicSmemBytes = static_cast<size_t>(Kernel::kSharedBytes);
            config.stream = stream;
            config.attrs = &cluster;
            config.numAttrs = 1;
            cudaLaunchKernelEx(&config, kernelEntry<Kernel>, args);
        } else {
            kernelEntry<Kernel><<<grid, Kernel::kThreads, static_cast<size_t>(Kernel::kSharedBytes), stream>>>(args);
        }
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? Status::kOk : cudaFailure(name, "launch", error);
    }
};

}  // namespace mxc
