// Logits of llama.cpp for a list of token ids: logits MODEL THREADS < ids > float32 rows, one per token.

#include <llama.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <vector>

namespace {
void quiet(ggml_log_level level, const char* text, void*) {
    if (level >= GGML_LOG_LEVEL_WARN) std::fputs(text, stderr);
}

int fail(const char* what) {
    std::fprintf(stderr, "logits: %s\n", what);
    return 1;
}
}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return fail("usage: logits MODEL THREADS < ids");
    llama_log_set(quiet, nullptr);
    std::vector<llama_token> ids{std::istream_iterator<llama_token>(std::cin), {}};
    const auto tokens = static_cast<int32_t>(ids.size());

    llama_model* model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (model == nullptr) return fail("the model does not load");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = static_cast<uint32_t>(tokens);
    params.n_threads = params.n_threads_batch = std::atoi(arguments[2]);
    params.type_k = params.type_v = GGML_TYPE_F32;
    llama_context* context = llama_init_from_model(model, params);
    if (context == nullptr) return fail("no context");

    llama_batch batch = llama_batch_init(tokens, 0, 1);
    for (int32_t i = 0; i < tokens; ++i) {
        batch.token[i] = ids[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = tokens;
    if (llama_decode(context, batch) != 0) return fail("decode failed");
    const auto width = static_cast<size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
    for (int32_t i = 0; i < tokens; ++i)
        if (std::fwrite(llama_get_logits_ith(context, i), sizeof(float), width, stdout) != width)
            return fail("cannot write");
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
