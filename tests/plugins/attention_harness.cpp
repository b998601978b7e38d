// A C interface over the softmax attention checks, its plan and its emulated kernels; tests/plugins/test_attention.py
// builds it with an ordinary C++ compiler.
#include <cstdarg>
#include <cstdio>

#include "attention/dispatch.cuh"

namespace {

thread_local char text[512] = "";

struct EmulatedRunner {
    int schedule;
    template <class Kernel>
    mxc::Status run(unsigned grid, const typename Kernel::Args& args) {
        try {
            mxc::emu::launch<Kernel>(grid, args, schedule);
        } catch (const std::exception& error) {
            return mxc::fail(mxc::Status::kCuda, "%s", error.what());
        }
        return mxc::Status::kOk;
    }
};

}  // namespace

namespace mxc {

const char* lastError() noexcept { return text; }

Status fail(Status status, const char* format, ...) noexcept {
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return status;
}

}  // namespace mxc

extern "C" {

const char* host_last_error() { return text; }

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
    EmulatedRunner runner{schedule};
    return static_cast<int>(mxc::runAttention(*params, splits, runner));
}

}  // extern "C"
