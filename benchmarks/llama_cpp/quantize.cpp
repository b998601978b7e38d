// A GGUF file of f32 weights in 4 bits, by llama.cpp's own rules: quantize F32_MODEL OUT THREADS

#include <llama.h>

#include <cstdio>
#include <cstdlib>

namespace {
void quiet(ggml_log_level level, const char* text, void*) {
    if (level >= GGML_LOG_LEVEL_WARN) std::fputs(text, stderr);
}
}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fputs("usage: quantize F32_MODEL OUT THREADS\n", stderr);
        return 1;
    }
    llama_log_set(quiet, nullptr);
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    params.nthread = std::atoi(arguments[3]);
    return llama_model_quantize(arguments[1], arguments[2], &params) == 0 ? 0 : 1;
}
