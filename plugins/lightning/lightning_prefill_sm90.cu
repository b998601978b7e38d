#include <cstring>

#include "dispatch.cuh"
#include "lightning_prefill_sm90.h"
#include "mxc/launch.cuh"
#include "prefill_sm90.cuh"
#include "row_map.h"

namespace mxc {
namespace {

constexpr char kName[] = "lightning prefill (sm_90a)";

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
              "TensorMap holds a CUtensorMap");

// Other architectures' code of the same kernel does nothing; the plan's check (compute capability 9.0) keeps it from
// being launched.
template <class Kernel>
struct OnlySm90 : Kernel {
    static __device__ void run(const typename Kernel::Args& args, char* memory) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        Kernel::run(args, memory);
#else
        static_cast<void>(args);
        static_cast<void>(memory);
#endif
    }
};

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver: this library must load where there is none.
Status findEncode(Encode& encode) noexcept {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cudaFailure(kName, "asking the driver for cuTensorMapEncodeTiled", error);
    }
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
        return fail(Status::kCuda, "%s: the driver has no cuTensorMapEncodeTiled; use a driver for CUDA 12 or later",
                    kName);
    }
    encode = reinterpret_cast<Encode>(found);
    return Status::kOk;
}

struct HopperRunner {
    CudaRunner runner;
    Encode encode;

    template <class Kernel>
    Status run(unsigned grid, const typename Kernel::Args& args) noexcept {
        return runner.run<OnlySm90<Kernel>>(grid, args);
    }

    // Boxes of 64 columns and `tokens` tokens of one head in [B, T, H, 128].
    Status rowMap(TensorMap& map, const uint16_t* rows, const LightningParams& params, int tokens) const noexcept {
        CUtensorMap made;
        const CUresult result = encodeRowMap(encode, made, rows, params, tokens);
        if (result != CUDA_SUCCESS) {
            return fail(Status::kCuda, "%s: the driver refuses the tensor map of [%d, %d, %d, 128] (CUresult %d)",
                        kName, params.batch, params.tokens, params.heads, static_cast<int>(result));
        }
        std::memcpy(&map, &made, sizeof made);
        return Status::kOk;
    }
};

}  // namespace

Status runLightningPrefillSm90(const LightningParams& params, const LightningPlan& plan, cudaStream_t stream) noexcept {
    // A driver function, unlike the runtime's, needs a context that is current in this thread: any of the runtime's
    // calls on a stream makes it so, and this one is allowed in a capture. What it says does not matter.
    cudaStreamCaptureStatus capture;
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) cudaGetLastError();
    Encode encode = nullptr;
    const Status status = findEncode(encode);
    if (status != Status::kOk) return status;
    CudaRunner runner{kName, stream};
    HopperRunner hopper{runner, encode};
    return runPrefillSm90(params, plan, runner, hopper);
}

}  // namespace mxc
