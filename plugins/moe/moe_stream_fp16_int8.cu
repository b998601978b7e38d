// The few-token kernels for fp16 tokens, int8 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_STREAM(, Half, true)

}  // namespace mxc
