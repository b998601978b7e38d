#include "dispatch.cuh"
#include "lightning_prefill_sm90.h"
#include "mxc/launch.cuh"
#include "prefill_sm90.cuh"

namespace mxc {
namespace {

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

struct Sm90Runner {
    CudaRunner runner;
    template <class Kernel>
    Status run(unsigned grid, const typename Kernel::Args& args) noexcept {
        return runner.run<OnlySm90<Kernel>>(grid, args);
    }
};

}  // namespace

Status runLightningPrefillSm90(const LightningParams& params, const LightningPlan& plan, cudaStream_t stream) noexcept {
    CudaRunner runner{"lightning prefill (sm_90a)", stream};
    Sm90Runner main{runner};
    return runPrefillSm90(params, plan, runner, main);
}

}  // namespace mxc
