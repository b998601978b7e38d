// The few-token kernels for bf16 tokens, int8 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_STREAM(, BFloat16, true)

}  // namespace mxc
