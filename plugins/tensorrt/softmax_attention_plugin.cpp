#include "tensorrt/softmax_attention_plugin.h"

#include <cmath>
#include <limits>

#include "mxc/architectures.h"

namespace mxc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

enum Input : int32_t { kQuery, kKeys, kValues, kPast, kNew, kInputs };
constexpr const char* kInputNames[] = {"query", "key_cache", "value_cache", "past_lengths", "new_lengths"};

bool fits(int64_t have, int64_t want) noexcept { return have < 0 || want < 0 || have == want; }

}  // namespace

std::vector<nvinfer1::PluginField> SoftmaxAttentionPlugin::fieldNames() {
    return {{"scale", nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1}};
}

nvinfer1::IPluginV3* SoftmaxAttentionPlugin::create(const char* op, const std::string& node,
                                                    const nvinfer1::PluginFieldCollection* fields) {
    std::string name = node;
    float scale = 0.0f;
    FieldReader reader(op, node, fields, {"scale", kNodeField});
    reader.read("scale", scale);
    reader.read(kNodeField, name);
    if (!reader.ok()) return nullptr;
    if (!std::isfinite(scale)) {
        reportError(op, name, "scale is not finite");
        return nullptr;
    }
    return new SoftmaxAttentionPlugin(op, std::move(name), scale);
}

int32_t SoftmaxAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t nb_outputs, const DataType* inputs,
                                                   int32_t nb_inputs) const noexcept {
    if (nb_inputs != kInputs || nb_outputs != 1) {
        return reportError(op_, node_,
                           "it takes query, key_cache, value_cache, past_lengths and new_lengths; it has %d inputs",
                           nb_inputs);
    }
    if (!isActivation(inputs[kQuery])) {
        return reportError(op_, node_, "query is %s; give fp16 or bf16", typeName(inputs[kQuery]));
    }
    for (const Input input : {kKeys, kValues}) {
        if (inputs[input] != inputs[kQuery]) {
            return reportError(op_, node_, "%s is %s and query %s; they must be the same", kInputNames[input],
                               typeName(inputs[input]), typeName(inputs[kQuery]));
        }
    }
    if (inputs[kPast] != inputs[kNew] || (inputs[kPast] != DataType::kINT32 && inputs[kPast] != DataType::kINT64)) {
        return reportError(op_, node_, "past_lengths is %s and new_lengths %s; give both in int32 or in int64",
                           typeName(inputs[kPast]), typeName(inputs[kNew]));
    }
    outputs[0] = inputs[kQuery];
    return 0;
}

int32_t SoftmaxAttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs,
                                                const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                                int32_t nb_outputs, nvinfer1::IExprBuilder&) noexcept {
    if (nb_inputs != kInputs || nb_outputs != 1) return -1;
    Dims dims[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) {
        dims[i].nbDims = inputs[i].nbDims;
        for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) dims[i].d[axis] = constantDim(inputs[i], axis);
    }
    if (checkShape(dims) != 0) return -1;
    outputs[0] = inputs[kQuery];
    return 0;
}

// Checks what is known (-1: not known yet).
int32_t SoftmaxAttentionPlugin::checkShape(const Dims* dims) const noexcept {
    for (int32_t input = 0; input < kInputs; ++input) {
        const int32_t rank = input >= kPast ? 1 : 4;
        if (dims[input].nbDims != rank) {
            return reportError(op_, node_, "%s has %d dimensions; give %s", kInputNames[input], dims[input].nbDims,
                               input >= kPast    ? "[B]"
                               : input == kQuery ? "[B, heads, T, head_dim]"
                                                 : "[B, kv_heads, capacity, head_dim]");
        }
        if (!fits(dims[input].d[0], dims[kQuery].d[0])) {
            return reportError(op_, node_, "%s is for %lld sequences and query for %lld", kInputNames[input],
                               static_cast<long long>(dims[input].d[0]), static_cast<long long>(dims[kQuery].d[0]));
        }
    }
    const int64_t heads = dims[kQuery].d[1];
    const int64_t kv_heads = dims[kKeys].d[1];
    const int64_t head_dim = dims[kQuery].d[3];
    if (heads < 0 || kv_heads < 0 || head_dim < 0) {
        return reportError(op_, node_, "numbers of heads and head_dim must be static");
    }
    if (head_dim != 64 && head_dim != 128) {
        return reportError(op_, node_, "head_dim is %lld; it must be 64 or 128", static_cast<long long>(head_dim));
    }
    if (kv_heads == 0 || heads == 0 || heads % kv_heads != 0) {
        return reportError(op_, node_, "%lld heads are not a multiple of %lld key/value heads",
                           static_cast<long long>(heads), static_cast<long long>(kv_heads));
    }
    for (const Input input : {kKeys, kValues}) {
        if (!fits(dims[input].d[3], head_dim) || !fits(dims[input].d[1], kv_heads) ||
            !fits(dims[input].d[2], dims[kKeys].d[2])) {
            return reportError(op_, node_, "key_cache and value_cache must both be [B, %lld, capacity, %lld]",
                               static_cast<long long>(kv_heads), static_cast<long long>(head_dim));
        }
    }
    for (const int64_t dim : {dims[kQuery].d[0], dims[kQuery].d[2], dims[kKeys].d[2]}) {
        if (dim > std::numeric_limits<int32_t>::max()) return reportError(op_, node_, "a dimension is beyond 2^31 - 1");
    }
    return 0;
}

bool SoftmaxAttentionPlugin::supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                                       int32_t, int32_t) noexcept {
    const nvinfer1::PluginTensorDesc& desc = tensors[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (pos == kQuery) return isActivation(desc.type);
    if (pos == kPast) return desc.type == DataType::kINT32 || desc.type == DataType::kINT64;
    return desc.type == tensors[pos == kNew ? kPast : kQuery].desc.type;
}

size_t SoftmaxAttentionPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
    return softmaxAttentionMaxWorkspaceBytes(static_cast<int32_t>(inputs[kQuery].max.d[3]));
}

int32_t SoftmaxAttentionPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                                              const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
    if (nb_inputs != kInputs) return -1;
    Dims dims[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) dims[i] = inputs[i].dims;
    return checkShape(dims);
}

int32_t SoftmaxAttentionPlugin::enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc*,
                                        const void* const* inputs, void* const* outputs, void* workspace,
                                        cudaStream_t stream) noexcept {
    const Dims& query = input_desc[kQuery].dims;
    const Dims& cache = input_desc[kKeys].dims;
    SoftmaxAttentionParams params;
    params.q_BHTK = inputs[kQuery];
    params.k_BGSK = inputs[kKeys];
    params.v_BGSK = inputs[kValues];
    params.out_BHTK = outputs[0];
    params.past_lengths_B = inputs[kPast];
    params.new_lengths_B = inputs[kNew];
    params.wide_lengths = input_desc[kPast].type == DataType::kINT64;
    params.batch = static_cast<int32_t>(query.d[0]);
    params.heads = static_cast<int32_t>(query.d[1]);
    params.tokens = static_cast<int32_t>(query.d[2]);
    params.head_dim = static_cast<int32_t>(query.d[3]);
    params.kv_heads = static_cast<int32_t>(cache.d[1]);
    params.capacity = static_cast<int32_t>(cache.d[2]);
    params.scale = scale_ != 0.0f ? scale_ : 1.0f / std::sqrt(static_cast<float>(params.head_dim));
    params.dtype = toDType(input_desc[kQuery].type);
    params.workspace = workspace;
    params.workspace_bytes = softmaxAttentionMaxWorkspaceBytes(params.head_dim);
    const Status status = explainCudaFailure(launchSoftmaxAttention(params, stream), "softmax_attention");
    return status == Status::kOk ? 0 : reportError(op_, node_, "%s", lastError());
}

}  // namespace mxc::trt
