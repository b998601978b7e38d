// Types that every kernel launcher shares: element types, status codes, the last error text.
// Framework-free: raw device pointers and a CUDA stream, nothing of torch or TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mxc {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };

enum class Status : int32_t {
    kOk = 0,
    kInvalidArgument = 1,  // a shape, length, pointer or option is wrong: the caller's mistake
    kUnsupported = 2,      // right in itself, but no kernel in this library does it
    kArchitecture = 3,     // the library was not built for this GPU
    kWorkspace = 4,        // the workspace given is too small
    kCuda = 5,             // a CUDA call or launch failed
};

// Text of the last failure on this thread ("lightning_attention: head_dim 96 is not supported; use 64 or 128"). Never
// null.
const char* lastError() noexcept;

// Records the text (printf style) and returns the status, so that launchers can `return fail(...)`.
Status fail(Status status, const char* format, ...) noexcept __attribute__((format(printf, 2, 3)));

}  // namespace mxc
