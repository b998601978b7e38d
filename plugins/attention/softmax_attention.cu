#include "attention/dispatch.cuh"
#include "attention/softmax_attention.h"
#include "mxc/launch.cuh"

namespace mxc {

Status launchSoftmaxAttention(const SoftmaxAttentionParams& params, cudaStream_t stream) noexcept {
    constexpr char kName[] = "softmax attention";
    Status status = checkSoftmaxAttention(params);
    if (status != Status::kOk || params.batch == 0 || params.tokens == 0) return status;
    DeviceFacts facts;
    status = deviceFacts(kName, facts);
    if (status != Status::kOk) return status;
    CudaRunner runner{kName, stream};
    return runAttention(params, softmaxAttentionSplits(params, facts.sm_count), runner);
}

}  // namespace mxc
