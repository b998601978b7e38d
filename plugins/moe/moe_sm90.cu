#include "moe_runner.cuh"
namespace mxc {
Status runMoeSm90(const MoeArgs&, int32_t, cudaStream_t) noexcept {
    return fail(Status::kArchitecture, "moe: this library was built without the sm_90a kernels");
}
}  // namespace mxc
