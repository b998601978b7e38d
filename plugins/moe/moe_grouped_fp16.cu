// The portable grouped GEMM for fp16 tokens, fp16 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_GROUPED(, Half, false)

}  // namespace mxc
