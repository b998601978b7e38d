// The runner of the launcher, and the list of the kernels that are compiled apart (moe_stream_*.cu, moe_grouped_*.cu).
#pragma once

#include "mxc/launch.cuh"
#include "run.cuh"

namespace mxc {

// fc1, SwiGLU and fc2 with CUTLASS' grouped GEMM (moe_sm90.cu).
Status runMoeSm90(const MoeArgs& args, int32_t sm_count, cudaStream_t stream) noexcept;

struct MoeRunner : CudaRunner {
    int32_t sm_count;
    Status sm90(const MoeArgs& args) noexcept { return runMoeSm90(args, sm_count, stream); }
};

#define MXC_MOE_STREAM(prefix, Element, int8) \
    prefix template Status runMoeStream<Element, int8, MoeRunner>(const MoeArgs&, MoeRunner&);
#define MXC_MOE_GROUPED(prefix, Element, int8)                                                      \
    prefix template Status runMoeGrouped<Element, int8, 64, MoeRunner>(const MoeArgs&, MoeRunner&); \
    prefix template Status runMoeGrouped<Element, int8, 128, MoeRunner>(const MoeArgs&, MoeRunner&);

}  // namespace mxc
