// C interface over the launchers, for ctypes (plugins/library.py), tests and benchmarks: plain structs, device
// pointers, a stream as a void pointer. Every function returns a status: 0 is good, the others are those of
// mxc/types.h, and mxc_last_error() has the text. The structs mirror LightningParams, LightningPlan, MoeParams and
// SoftmaxAttentionParams; see those for meanings.
//
// A caller sets `struct_bytes` to sizeof of the struct it was built with; another size is refused.
//
// Launchers work on `stream` alone, wait for nothing and allocate nothing, so they can be captured in a CUDA graph; but
// launch once with the same shapes before: the driver loads a kernel at its first launch, which a capture may not
// allow.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MXC_API __attribute__((visibility("default")))

// Raised by one whenever a struct or a signature below changes.
#define MXC_ABI_VERSION 2

typedef struct mxc_lightning_params {
    int64_t struct_bytes;
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const float* state_in;
    float* state_out;
    const int32_t* slots;
    const float* log_decay;
    const float* slopes;
    const int32_t* lengths;
    void* workspace;
    int64_t workspace_bytes;
    int32_t batch;
    int32_t tokens;
    int32_t heads;
    int32_t head_dim;
    int32_t pool_slots;
    int32_t dtype;
    float scale;
    int32_t reserved;
} mxc_lightning_params;

typedef struct mxc_lightning_plan {
    int32_t kernel;
    int32_t value_splits;
    int32_t segments;
    int32_t segment_chunks;
} mxc_lightning_plan;

typedef struct mxc_moe_params {
    int64_t struct_bytes;
    const void* x;
    const void* router_logits;
    const void* fc1;
    const void* fc2;
    const void* fc1_scale;
    const void* fc2_scale;
    void* out;
    void* workspace;
    int64_t workspace_bytes;
    int32_t router_dtype;
    int32_t scale_dtype;
    int32_t dtype;
    int32_t weight_dtype;
    int32_t tokens;
    int32_t hidden;
    int32_t inner;
    int32_t experts;
    int32_t top_k;
    int32_t first_local;
    int32_t local_experts;
    int32_t normalize;
} mxc_moe_params;

typedef struct mxc_attention_params {
    int64_t struct_bytes;
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const void* past_lengths;
    const void* new_lengths;
    void* workspace;
    int64_t workspace_bytes;
    int32_t batch;
    int32_t tokens;
    int32_t heads;
    int32_t kv_heads;
    int32_t capacity;
    int32_t head_dim;
    int32_t dtype;
    int32_t wide_lengths;
    float scale;
    int32_t reserved;
} mxc_attention_params;

// Queries that need no GPU.
MXC_API int32_t mxc_abi_version(void);
MXC_API const char* mxc_last_error(void);
MXC_API const char* mxc_architectures(void);  // "80,90a"
MXC_API int32_t mxc_architecture_runs(const char* architectures, int32_t compute_capability);
MXC_API int32_t mxc_lightning_plan_prefill(int32_t batch, int32_t tokens, int32_t heads, int32_t head_dim,
                                           int32_t sm_count, int32_t compute_capability, mxc_lightning_plan* plan);
MXC_API int64_t mxc_lightning_workspace_bytes(const mxc_lightning_plan* plan, int32_t batch, int32_t heads,
                                              int32_t head_dim);
MXC_API int64_t mxc_attention_max_workspace_bytes(int32_t head_dim);
MXC_API int64_t mxc_moe_workspace_bytes(const mxc_moe_params* params);  // negative: refused

// kOk where this library has code for the calling thread's current device.
MXC_API int32_t mxc_check_device(void);
// `plan` may be null.
MXC_API int32_t mxc_lightning_prefill(const mxc_lightning_params* params, const mxc_lightning_plan* plan, void* stream);
MXC_API int32_t mxc_lightning_decode(const mxc_lightning_params* params, void* stream);
MXC_API int32_t mxc_moe(const mxc_moe_params* params, void* stream);
MXC_API int32_t mxc_softmax_attention(const mxc_attention_params* params, void* stream);

#ifdef __cplusplus
}
#endif
