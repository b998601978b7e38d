// The few-token kernels for bf16 tokens, bf16 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_STREAM(, BFloat16, false)

}  // namespace mxc
