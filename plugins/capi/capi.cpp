#include "capi/capi.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "attention/softmax_attention.h"
#include "lightning/lightning_attention.h"
#include "moe/moe.h"
#include "mxc/architectures.h"
#include "mxc/types.h"

namespace {

using mxc::DType;
using mxc::Status;

int32_t code(Status status) noexcept { return static_cast<int32_t>(status); }

// A null struct or one of another size: the caller was built for another version of this library.
template <typename Params>
Status checkStruct(const Params* params, const char* op) noexcept {
    if (params == nullptr) return mxc::fail(Status::kInvalidArgument, "%s: no parameters given", op);
    if (params->struct_bytes != static_cast<int64_t>(sizeof(Params))) {
        return mxc::fail(Status::kInvalidArgument,
                         "%s: parameters of %lld bytes, %zu expected: caller and library are of different versions", op,
                         static_cast<long long>(params->struct_bytes), sizeof(Params));
    }
    if (params->workspace_bytes < 0) return mxc::fail(Status::kInvalidArgument, "%s: negative workspace_bytes", op);
    return Status::kOk;
}

Status checkDType(int32_t value, const char* op, const char* name) noexcept {
    if (value >= 0 && value <= static_cast<int32_t>(DType::kInt8)) return Status::kOk;
    return mxc::fail(Status::kInvalidArgument, "%s: %s %d is not a data type", op, name, value);
}

mxc::LightningPlan toPlan(const mxc_lightning_plan& plan) noexcept {
    mxc::LightningPlan result;
    result.kernel = plan.kernel;
    result.value_splits = plan.value_splits;
    result.segments = plan.segments;
    result.segment_chunks = plan.segment_chunks;
    return result;
}

Status toParams(const mxc_lightning_params* from, const char* op, mxc::LightningParams& to) noexcept {
    if (const Status status = checkStruct(from, op); status != Status::kOk) return status;
    if (const Status status = checkDType(from->dtype, op, "dtype"); status != Status::kOk) return status;
    to.q_BTHK = from->q;
    to.k_BTHK = from->k;
    to.v_BTHV = from->v;
    to.out_BTHV = from->out;
    to.state_in_PHKV = from->state_in;
    to.state_out_PHKV = from->state_out;
    to.slots_B = from->slots;
    to.log_decay_BTH = from->log_decay;
    to.slopes_H = from->slopes;
    to.lengths_B = from->lengths;
    to.batch = from->batch;
    to.tokens = from->tokens;
    to.heads = from->heads;
    to.head_dim = from->head_dim;
    to.slots = from->pool_slots;
    to.scale = from->scale;
    to.dtype = static_cast<DType>(from->dtype);
    to.workspace = from->workspace;
    to.workspace_bytes = static_cast<size_t>(from->workspace_bytes);
    return Status::kOk;
}

Status toParams(const mxc_moe_params* from, const char* op, mxc::MoeParams& to) noexcept {
    if (const Status status = checkStruct(from, op); status != Status::kOk) return status;
    for (const auto& [value, name] : {std::pair<int32_t, const char*>{from->dtype, "dtype"},
                                      {from->router_dtype, "router_dtype"},
                                      {from->scale_dtype, "scale_dtype"},
                                      {from->weight_dtype, "weight_dtype"}}) {
        if (const Status status = checkDType(value, op, name); status != Status::kOk) return status;
    }
    to.x_ND = from->x;
    to.router_logits_NE = from->router_logits;
    to.router_dtype = static_cast<DType>(from->router_dtype);
    to.fc1_E2ID = from->fc1;
    to.fc2_EDI = from->fc2;
    to.fc1_scale_E2I = from->fc1_scale;
    to.fc2_scale_ED = from->fc2_scale;
    to.scale_dtype = static_cast<DType>(from->scale_dtype);
    to.out_ND = from->out;
    to.tokens = from->tokens;
    to.hidden = from->hidden;
    to.inner = from->inner;
    to.experts = from->experts;
    to.top_k = from->top_k;
    to.first_local = from->first_local;
    to.local_experts = from->local_experts;
    to.normalize = from->normalize != 0;
    to.dtype = static_cast<DType>(from->dtype);
    to.weight_dtype = static_cast<DType>(from->weight_dtype);
    to.workspace = from->workspace;
    to.workspace_bytes = static_cast<size_t>(from->workspace_bytes);
    return Status::kOk;
}

Status toParams(const mxc_attention_params* from, const char* op, mxc::SoftmaxAttentionParams& to) noexcept {
    if (const Status status = checkStruct(from, op); status != Status::kOk) return status;
    if (const Status status = checkDType(from->dtype, op, "dtype"); status != Status::kOk) return status;
    to.q_BHTK = from->q;
    to.k_BGSK = from->k;
    to.v_BGSK = from->v;
    to.out_BHTK = from->out;
    to.past_lengths_B = from->past_lengths;
    to.new_lengths_B = from->new_lengths;
    to.wide_lengths = from->wide_lengths != 0;
    to.batch = from->batch;
    to.tokens = from->tokens;
    to.heads = from->heads;
    to.kv_heads = from->kv_heads;
    to.capacity = from->capacity;
    to.head_dim = from->head_dim;
    to.scale = from->scale;
    to.dtype = static_cast<DType>(from->dtype);
    to.workspace = from->workspace;
    to.workspace_bytes = static_cast<size_t>(from->workspace_bytes);
    return Status::kOk;
}

cudaStream_t toStream(void* stream) noexcept { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

int32_t mxc_abi_version(void) { return MXC_ABI_VERSION; }

const char* mxc_last_error(void) { return mxc::lastError(); }

const char* mxc_architectures(void) { return mxc::builtArchitectures(); }

int32_t mxc_architecture_runs(const char* architectures, int32_t compute_capability) {
    return architectures != nullptr && mxc::architectureRuns(architectures, compute_capability) ? 1 : 0;
}

int32_t mxc_lightning_plan_prefill(int32_t batch, int32_t tokens, int32_t heads, int32_t head_dim, int32_t sm_count,
                                   int32_t compute_capability, mxc_lightning_plan* plan) {
    if (plan == nullptr) return code(mxc::fail(Status::kInvalidArgument, "lightning_attention: no plan to fill in"));
    const mxc::LightningPlan made =
        mxc::planLightningPrefill(batch, tokens, heads, head_dim, sm_count, compute_capability);
    plan->kernel = made.kernel;
    plan->value_splits = made.value_splits;
    plan->segments = made.segments;
    plan->segment_chunks = made.segment_chunks;
    return code(Status::kOk);
}

int64_t mxc_lightning_workspace_bytes(const mxc_lightning_plan* plan, int32_t batch, int32_t heads, int32_t head_dim) {
    return plan == nullptr ? 0
                           : static_cast<int64_t>(mxc::lightningWorkspaceBytes(toPlan(*plan), batch, heads, head_dim));
}

int64_t mxc_moe_workspace_bytes(const mxc_moe_params* params) {
    mxc::MoeParams made;
    if (toParams(params, "moe", made) != Status::kOk) return -1;
    return static_cast<int64_t>(mxc::moeWorkspaceBytes(made));
}

int64_t mxc_attention_max_workspace_bytes(int32_t head_dim) {
    return static_cast<int64_t>(mxc::softmaxAttentionMaxWorkspaceBytes(head_dim));
}

int32_t mxc_check_device(void) { return code(mxc::checkDevice("mxcompile")); }

int32_t mxc_lightning_prefill(const mxc_lightning_params* params, const mxc_lightning_plan* plan, void* stream) {
    mxc::LightningParams made;
    if (const Status status = toParams(params, "lightning_attention", made); status != Status::kOk) return code(status);
    const mxc::LightningPlan chosen = plan == nullptr ? mxc::LightningPlan{} : toPlan(*plan);
    return code(mxc::explainCudaFailure(
        mxc::launchLightningPrefill(made, plan == nullptr ? nullptr : &chosen, toStream(stream)),
        "lightning_attention"));
}

int32_t mxc_lightning_decode(const mxc_lightning_params* params, void* stream) {
    mxc::LightningParams made;
    if (const Status status = toParams(params, "lightning_attention", made); status != Status::kOk) return code(status);
    return code(mxc::explainCudaFailure(mxc::launchLightningDecode(made, toStream(stream)), "lightning_attention"));
}

int32_t mxc_moe(const mxc_moe_params* params, void* stream) {
    mxc::MoeParams made;
    if (const Status status = toParams(params, "moe", made); status != Status::kOk) return code(status);
    return code(mxc::explainCudaFailure(mxc::launchMoe(made, toStream(stream)), "moe"));
}

int32_t mxc_softmax_attention(const mxc_attention_params* params, void* stream) {
    mxc::SoftmaxAttentionParams made;
    if (const Status status = toParams(params, "softmax_attention", made); status != Status::kOk) return code(status);
    return code(mxc::explainCudaFailure(mxc::launchSoftmaxAttention(made, toStream(stream)), "softmax_attention"));
}

}  // extern "C"
