// In the place of the CUDA runtime: writes down what the launchers ask of it, so that their side of a launch is tested
// where there is no GPU. Linked with the library's own objects by tests/plugins/test_launches.py. The device is an
// H200; kernels do not run. `fake_fail` makes one function fail.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "lightning/prefill_args.h"

namespace {

struct Map {  // what the fake driver leaves in a CUtensorMap
    uint64_t address;
    uint32_t box[4];
};

// Kernels are registered by the other objects' static initialisers, in whatever order.
std::map<const void*, std::string>& kernels() {
    static std::map<const void*, std::string> names;
    return names;
}
std::string log_text, fail_name;
cudaError_t fail_code = cudaSuccess, last_error = cudaSuccess;
int device = 0;

struct Call {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed;

void say(const char* format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    log_text += text;
    log_text += '\n';
}

cudaError_t answer(const char* name) {
    if (fail_name != name) return cudaSuccess;
    last_error = fail_code;
    return fail_code;
}

CUresult encode(CUtensorMap* made, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t*,
                const cuuint64_t*, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    Map map{reinterpret_cast<uint64_t>(address), {}};
    for (cuuint32_t i = 0; i < rank && i < 4; ++i) map.box[i] = box[i];
    memset(made, 0, sizeof *made);
    memcpy(made, &map, sizeof map);
    if (reinterpret_cast<uintptr_t>(made) % 64 != 0) say("misaligned tensor map");
    return fail_name == "cuTensorMapEncodeTiled" ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

void launched(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, dim3 cluster,
              void** args) {
    const std::string& name = kernels()[kernel];
    say("launch|%s|%u,%u,%u|%u|%zu|%zu|%u,%u,%u", name.c_str(), grid.x, grid.y, grid.z, block.x * block.y * block.z,
        shared, reinterpret_cast<size_t>(stream), cluster.x, cluster.y, cluster.z);
    if (name.find("PrefillSm90") == std::string::npos) return;
    // The maps follow the arguments (PrefillSm90Args), each at a multiple of 128 bytes of the parameter.
    const char* parameter = static_cast<const char*>(args[0]);
    const size_t first = (sizeof(mxc::PrefillArgs) + 127) / 128 * 128;
    for (int i = 0; i < 4; ++i) {
        Map map;
        memcpy(&map, parameter + first + 128 * static_cast<size_t>(i), sizeof map);
        say("map|%c|%" PRIu64 "|%u,%u,%u,%u", "qkvo"[i], map.address, map.box[0], map.box[1], map.box[2], map.box[3]);
    }
}

}  // namespace

extern "C" {

void fake_reset(int current_device) {
    log_text.clear();
    fail_name.clear();
    fail_code = cudaSuccess;  // an error that nobody has taken stays, as the runtime's does
    device = current_device;
}
void fake_fail(const char* name, int code) {
    fail_name = name;
    fail_code = static_cast<cudaError_t>(code);
}
const char* fake_log() { return log_text.c_str(); }

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<cudaStream_t*>(stream) = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
    launched(kernel, grid, block, shared, stream, dim3(1, 1, 1), args);
    return answer("launch");
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {  // what <<<>>> becomes before CUDA 13
    launched(kernel, grid, block, shared, stream, dim3(1, 1, 1), args);
    return answer("launch");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
    dim3 cluster(1, 1, 1);
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) {
            say("unexpected launch attribute %d", static_cast<int>(config->attrs[i].id));
            continue;
        }
        const auto& given = config->attrs[i].val.clusterDim;
        cluster = dim3(given.x, given.y, given.z);
    }
    launched(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, cluster, args);
    return answer("launch");
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) say("unexpected function attribute");
    say("shared|%s|%d|%d", kernels()[kernel].c_str(), value, device);
    return answer("cudaFuncSetAttribute");
}
cudaError_t cudaGetDevice(int* current) {
    *current = device;
    return answer("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 132
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : -1;
    return answer("cudaDeviceGetAttribute");
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return answer("cudaStreamIsCapturing");
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
    const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
    *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
    if (status != nullptr) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return answer("cudaGetDriverEntryPointByVersion");
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
    say("memset|%zu", reinterpret_cast<size_t>(stream));
    return answer("cudaMemsetAsync");
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMadeUp"; }
const char* cudaGetErrorString(cudaError_t) { return "made up"; }
}
