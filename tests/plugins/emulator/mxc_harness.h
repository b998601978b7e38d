// What the harnesses over the emulated kernels (tests/plugins/*_harness.cpp) begin with: the last error's text, kept
// here instead of in the library's src/error.cpp, and the runner that starts kernels in the emulator. Included once in
// a library.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "mxc/types.h"
#include "mxc_emulator.h"

namespace mxc {

thread_local char harness_text[512] = "";

const char* lastError() noexcept { return harness_text; }

Status fail(Status status, const char* format, ...) noexcept {
    va_list args;
    va_start(args, format);
    vsnprintf(harness_text, sizeof harness_text, format, args);
    va_end(args);
    return status;
}

struct EmulatedRunner {
    int schedule;
    template <class Kernel>
    Status run(unsigned grid, const typename Kernel::Args& args) {
        try {
            emu::launch<Kernel>(grid, args, schedule);
        } catch (const std::exception& error) {
            return fail(Status::kCuda, "%s", error.what());
        }
        return Status::kOk;
    }
};

}  // namespace mxc

extern "C" const char* host_last_error() { return mxc::harness_text; }
