// The portable grouped GEMM for fp16 tokens, int8 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_GROUPED(, Half, true)

}  // namespace mxc
