#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "tensorrt/cast.h"

namespace mxc::trt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__global__ void toFloat32Kernel(const T* __restrict__ in, float* __restrict__ out, int64_t count) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride)
        out[i] = widen(in[i]);
}

}  // namespace

Status launchToFloat32(const void* in, float* out, int64_t count, DType dtype, cudaStream_t stream) noexcept {
    if (count <= 0) return Status::kOk;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, kMaxBlocks));
    if (dtype == DType::kFloat16) {
        toFloat32Kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const __half*>(in), out, count);
    } else if (dtype == DType::kBFloat16) {
        toFloat32Kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(in), out, count);
    } else {
        return fail(Status::kUnsupported, "cast: only fp16 and bf16 can be widened to fp32");
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? Status::kOk : fail(Status::kCuda, "cast: %s", cudaGetErrorString(error));
}

}  // namespace mxc::trt
