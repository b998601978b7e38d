// The portable grouped GEMM for bf16 tokens, bf16 weights.
#include "moe_runner.cuh"

namespace mxc {

MXC_MOE_GROUPED(, BFloat16, false)

}  // namespace mxc
