// The few-token kernels for fp16 tokens, fp16 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_STREAM(, Half, false)

}  // namespace mxc
