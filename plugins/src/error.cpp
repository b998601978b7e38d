// The last error text of each thread (see mxc/types.h).
#include <cstdarg>
#include <cstdio>

#include "mxc/types.h"

namespace mxc {
namespace {

thread_local char g_text[512] = "";

}  // namespace

const char* lastError() noexcept { return g_text; }

Status fail(Status status, const char* format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(g_text, sizeof(g_text), format, arguments);
    va_end(arguments);
    return status;
}

}  // namespace mxc
