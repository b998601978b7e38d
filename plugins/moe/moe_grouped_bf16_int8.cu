// The portable grouped GEMM for bf16 tokens, int8 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_GROUPED(, BFloat16, true)

}  // namespace mxc
