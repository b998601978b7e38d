// Widening of a small tensor to fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "mxc/types.h"

namespace mxc::trt {

// out[i] = float(in[i]) for `count` values of `dtype` (fp16 or bf16).
Status launchToFloat32(const void* in, float* out, int64_t count, DType dtype, cudaStream_t stream) noexcept;

}  // namespace mxc::trt
