// A C interface over the softmax attention checks, its plan and its emulated kernels; tests/plugins/test_attention.py
// builds it with an ordinary C++ compiler.
#include "attention/dispatch.cuh"
#include "mxc_harness.h"

extern "C" {

size_t host_size() { return sizeof(mxc::SoftmaxAttentionParams); }

int host_splits(const mxc::SoftmaxAttentionParams* params, int sm_count) {
    return mxc::softmaxAttentionSplits(*params, sm_count);
}

size_t host_workspace(const mxc::SoftmaxAttentionParams* params, int splits) {
    return mxc::softmaxAttentionWorkspaceBytes(*params, splits);
}

size_t host_max_workspace(int head_dim) { return mxc::softmaxAttentionMaxWorkspaceBytes(head_dim); }

int host_run(const mxc::SoftmaxAttentionParams* params, int splits, int schedule) {
    const mxc::Status status = mxc::checkSoftmaxAttention(*params);
    if (status != mxc::Status::kOk) return static_cast<int>(status);
    mxc::EmulatedRunner runner{schedule};
    return static_cast<int>(mxc::runAttention(*params, splits, runner));
}

}  // extern "C"
