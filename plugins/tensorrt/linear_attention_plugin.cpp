#include "tensorrt/linear_attention_plugin.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <limits>

#include "lightning/lightning_attention.h"
#include "mxc/architectures.h"
#include "tensorrt/cast.h"

namespace mxc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

enum Input : int32_t { kQuery, kKey, kValue, kPastState, kDecay };
constexpr const char* kInputNames[] = {"query", "key", "value", "past_state", "decay"};

// More multiprocessors than any GPU has: engines are built without knowing which GPU of their kind runs them, and the
// workspace bound grows with this number.
constexpr int32_t kMostMultiprocessors = 256;

bool isHeadDim(int64_t head_dim) noexcept { return head_dim == 64 || head_dim == 128; }

// Scratch for what the kernels read as decay: the widened input, or (no decay input) one slope of zero per head.
size_t decayBytes(const Dims& query, const nvinfer1::PluginTensorDesc* decay, int32_t heads) noexcept {
    if (decay == nullptr) return alignUp(static_cast<size_t>(heads) * sizeof(float));
    if (decay->type == DataType::kFLOAT) return 0;
    return alignUp(static_cast<size_t>(query.d[0]) * static_cast<size_t>(query.d[1]) * static_cast<size_t>(heads) *
                   sizeof(float));
}

size_t planBytes(const Dims& query, int32_t heads) noexcept {
    return lightningMaxWorkspaceBytes(static_cast<int32_t>(query.d[0]), static_cast<int32_t>(query.d[1]), heads,
                                      static_cast<int32_t>(query.d[2] / heads), kMostMultiprocessors, 90);
}

}  // namespace

std::vector<nvinfer1::PluginField> LinearAttentionPlugin::fieldNames() {
    using nvinfer1::PluginFieldType;
    return {{"q_num_heads", nullptr, PluginFieldType::kINT32, 1},
            {"kv_num_heads", nullptr, PluginFieldType::kINT32, 1},
            {"update_rule", nullptr, PluginFieldType::kCHAR, 1},
            {"scale", nullptr, PluginFieldType::kFLOAT32, 1},
            {"chunk_size", nullptr, PluginFieldType::kINT32, 1}};
}

nvinfer1::IPluginV3* LinearAttentionPlugin::create(const char* op, const std::string& node,
                                                   const nvinfer1::PluginFieldCollection* fields) {
    std::string name = node;
    LinearAttentionConfig config;
    int32_t kv_heads = 0;
    std::string rule = "gated_delta";  // the op's own default
    FieldReader reader(op, node, fields,
                       {"q_num_heads", "kv_num_heads", "update_rule", "scale", "chunk_size", kNodeField});
    reader.read("q_num_heads", config.heads, true);
    reader.read("kv_num_heads", kv_heads, true);
    reader.read("update_rule", rule);
    reader.read("scale", config.scale);
    reader.read("chunk_size", config.chunk_size);
    reader.read(kNodeField, name);
    if (!reader.ok()) return nullptr;
    config.gated = rule == "gated";
    if (rule == "delta" || rule == "gated_delta") {
        reportError(op, name, "update_rule '%s' is not supported; only 'linear' and 'gated' are", rule.c_str());
    } else if (!config.gated && rule != "linear") {
        reportError(op, name, "unknown update_rule '%s'; give 'linear' or 'gated'", rule.c_str());
    } else if (config.heads <= 0) {
        reportError(op, name, "q_num_heads is %d; it must be positive", config.heads);
    } else if (kv_heads != config.heads) {
        reportError(op, name, "kv_num_heads is %d and q_num_heads %d; only equal numbers are supported", kv_heads,
                    config.heads);
    } else if (!std::isfinite(config.scale)) {
        reportError(op, name, "scale is not finite");
    } else if (config.chunk_size < 0) {
        reportError(op, name, "chunk_size is %d; it must not be negative", config.chunk_size);
    } else {
        return new LinearAttentionPlugin(op, std::move(name), config, std::move(rule));
    }
    return nullptr;
}

void LinearAttentionPlugin::writeFields(FieldWriter& fields) const {
    fields.add("q_num_heads", config_.heads);
    fields.add("kv_num_heads", config_.heads);
    fields.add("update_rule", rule_);
    fields.add("scale", config_.scale);
    fields.add("chunk_size", config_.chunk_size);
}

bool LinearAttentionPlugin::checkInputCount(int32_t nb_inputs) const noexcept {
    if (config_.gated && nb_inputs != 5) {
        reportError(
            op_, node_,
            "update_rule 'gated' takes query, key, value, past_state and decay; it has %d inputs. TensorRT's plugins "
            "know no absent inputs: give a past_state of zeros where there is none, and no beta",
            nb_inputs);
        return false;
    }
    if (!config_.gated && nb_inputs != 3 && nb_inputs != 4) {
        reportError(op_, node_,
                    "update_rule 'linear' takes query, key, value and optionally past_state; it has %d inputs",
                    nb_inputs);
        return false;
    }
    return true;
}

int32_t LinearAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t nb_outputs, const DataType* inputs,
                                                  int32_t nb_inputs) const noexcept {
    if (!checkInputCount(nb_inputs)) return -1;
    if (nb_outputs != 2) return reportError(op_, node_, "it has 2 outputs, not %d", nb_outputs);
    if (!isActivation(inputs[kQuery])) {
        return reportError(op_, node_, "query is %s; give fp16 or bf16", typeName(inputs[kQuery]));
    }
    for (const Input input : {kKey, kValue}) {
        if (inputs[input] != inputs[kQuery]) {
            return reportError(op_, node_, "%s is %s and query %s; they must be the same", kInputNames[input],
                               typeName(inputs[input]), typeName(inputs[kQuery]));
        }
    }
    if (nb_inputs > kPastState && inputs[kPastState] != DataType::kFLOAT) {
        return reportError(op_, node_, "past_state is %s; the recurrent state must be fp32",
                           typeName(inputs[kPastState]));
    }
    if (nb_inputs > kDecay && inputs[kDecay] != DataType::kFLOAT && inputs[kDecay] != inputs[kQuery]) {
        return reportError(op_, node_, "decay is %s; give fp32 or the type of query", typeName(inputs[kDecay]));
    }
    outputs[0] = inputs[kQuery];
    outputs[1] = DataType::kFLOAT;
    return 0;
}

int32_t LinearAttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs,
                                               const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                               int32_t nb_outputs, nvinfer1::IExprBuilder& builder) noexcept {
    if (!checkInputCount(nb_inputs) || nb_outputs != 2) return -1;
    Dims dims[5];
    for (int32_t i = 0; i < nb_inputs; ++i) {
        dims[i].nbDims = inputs[i].nbDims;
        for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) dims[i].d[axis] = constantDim(inputs[i], axis);
    }
    if (checkShape(dims, nb_inputs) != 0) return -1;
    const nvinfer1::IDimensionExpr* heads = builder.constant(config_.heads);
    const nvinfer1::IDimensionExpr* head_dim =
        builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[kQuery].d[2], *heads);
    outputs[0] = inputs[kQuery];
    outputs[1].nbDims = 4;
    outputs[1].d[0] = inputs[kQuery].d[0];
    outputs[1].d[1] = heads;
    outputs[1].d[2] = head_dim;
    outputs[1].d[3] = head_dim;
    return 0;
}

// Checks what is known (-1: not known yet).
int32_t LinearAttentionPlugin::checkShape(const Dims* dims, int32_t nb_inputs) const noexcept {
    const int64_t heads = config_.heads;
    for (const Input input : {kQuery, kKey, kValue}) {
        if (dims[input].nbDims != 3) {
            return reportError(op_, node_, "%s has %d dimensions; give [B, T, heads * head_dim]", kInputNames[input],
                               dims[input].nbDims);
        }
        const int64_t width = dims[input].d[2];
        if (width < 0) return reportError(op_, node_, "the last dimension of %s must be static", kInputNames[input]);
        if (width % heads != 0 || !isHeadDim(width / heads)) {
            return reportError(op_, node_, "%s is %lld wide for %lld heads; head_dim must be 64 or 128",
                               kInputNames[input], static_cast<long long>(width), static_cast<long long>(heads));
        }
        if (width != dims[kQuery].d[2]) {
            return reportError(op_, node_, "%s is %lld wide and query %lld; only equal head sizes are supported",
                               kInputNames[input], static_cast<long long>(width),
                               static_cast<long long>(dims[kQuery].d[2]));
        }
    }
    const int64_t head_dim = dims[kQuery].d[2] / heads;
    const int64_t wanted[5][4] = {{dims[kQuery].d[0], dims[kQuery].d[1], heads * head_dim, 0},
                                  {dims[kQuery].d[0], dims[kQuery].d[1], heads * head_dim, 0},
                                  {dims[kQuery].d[0], dims[kQuery].d[1], heads * head_dim, 0},
                                  {dims[kQuery].d[0], heads, head_dim, head_dim},
                                  {dims[kQuery].d[0], dims[kQuery].d[1], heads, 0}};
    for (int32_t input = kKey; input < nb_inputs; ++input) {
        const int32_t rank = input == kPastState ? 4 : 3;
        if (dims[input].nbDims != rank) {
            return reportError(op_, node_, "%s has %d dimensions; give %s", kInputNames[input], dims[input].nbDims,
                               input == kPastState ? "[B, heads, head_dim, head_dim]" : "[B, T, heads]");
        }
        for (int32_t axis = 0; axis < rank; ++axis) {
            const int64_t have = dims[input].d[axis];
            const int64_t want = wanted[input][axis];
            if (have >= 0 && want >= 0 && have != want) {
                return reportError(op_, node_, "dimension %d of %s is %lld; %lld expected%s", axis, kInputNames[input],
                                   static_cast<long long>(have), static_cast<long long>(want),
                                   input == kDecay && axis == 2 ? " (one decay per head)" : "");
            }
        }
    }
    return 0;
}

bool LinearAttentionPlugin::supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                                      int32_t nb_inputs, int32_t) noexcept {
    const nvinfer1::PluginTensorDesc& desc = tensors[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const DataType query = tensors[kQuery].desc.type;
    if (pos == kQuery) return isActivation(desc.type);
    if (pos == kKey || pos == kValue || pos == nb_inputs) return desc.type == query;
    if (pos < nb_inputs && pos == kDecay) return desc.type == DataType::kFLOAT || desc.type == query;
    return desc.type == DataType::kFLOAT;  // the states
}

size_t LinearAttentionPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nb_inputs,
                                               const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
    const Dims& query = inputs[kQuery].max;
    const nvinfer1::PluginTensorDesc* decay = nb_inputs > kDecay ? &inputs[kDecay].desc : nullptr;
    return decayBytes(query, decay, config_.heads) + planBytes(query, config_.heads);
}

int32_t LinearAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    // `linear` may have no past state, and this question comes without the number of inputs.
    return output == 1 && config_.gated && stateAliasing() ? static_cast<int32_t>(kPastState) : -1;
}

int32_t LinearAttentionPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                                             const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
    if (!checkInputCount(nb_inputs)) return -1;
    Dims dims[5];
    for (int32_t i = 0; i < nb_inputs; ++i) dims[i] = inputs[i].dims;
    inputs_ = nb_inputs;
    return checkShape(dims, nb_inputs);
}

int32_t LinearAttentionPlugin::enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc*,
                                       const void* const* inputs, void* const* outputs, void* workspace,
                                       cudaStream_t stream) noexcept {
    const Dims& query = input_desc[kQuery].dims;
    if (query.d[0] > std::numeric_limits<int32_t>::max() || query.d[1] > std::numeric_limits<int32_t>::max()) {
        return reportError(op_, node_, "batch or tokens beyond 2^31 - 1");
    }
    LightningParams params;
    params.q_BTHK = inputs[kQuery];
    params.k_BTHK = inputs[kKey];
    params.v_BTHV = inputs[kValue];
    params.out_BTHV = outputs[0];
    params.state_in_PHKV = inputs_ > kPastState ? static_cast<const float*>(inputs[kPastState]) : nullptr;
    params.state_out_PHKV = static_cast<float*>(outputs[1]);
    params.batch = static_cast<int32_t>(query.d[0]);
    params.tokens = static_cast<int32_t>(query.d[1]);
    params.heads = config_.heads;
    params.head_dim = static_cast<int32_t>(query.d[2] / config_.heads);
    params.scale = config_.scale != 0.0f ? config_.scale : 1.0f / std::sqrt(static_cast<float>(params.head_dim));
    params.dtype = toDType(input_desc[kQuery].type);

    const nvinfer1::PluginTensorDesc* decay = inputs_ > kDecay ? &input_desc[kDecay] : nullptr;
    auto* scratch = static_cast<float*>(workspace);
    Status status = Status::kOk;
    if (decay == nullptr) {
        const cudaError_t error =
            cudaMemsetAsync(scratch, 0, static_cast<size_t>(config_.heads) * sizeof(float), stream);
        if (error != cudaSuccess) status = fail(Status::kCuda, "clearing the slopes: %s", cudaGetErrorString(error));
        params.slopes_H = scratch;
    } else if (decay->type == DataType::kFLOAT) {
        params.log_decay_BTH = static_cast<const float*>(inputs[kDecay]);
    } else {
        status = launchToFloat32(inputs[kDecay], scratch, leadingVolume(decay->dims, 0), toDType(decay->type), stream);
        params.log_decay_BTH = scratch;
    }
    params.workspace_bytes = planBytes(query, config_.heads);
    params.workspace = static_cast<char*>(workspace) + decayBytes(query, decay, config_.heads);

    if (status == Status::kOk) {
        status = params.tokens == 1 ? launchLightningDecode(params, stream)
                                    : launchLightningPrefill(params, nullptr, stream);
    }
    status = explainCudaFailure(status, "lightning_attention");
    return status == Status::kOk ? 0 : reportError(op_, node_, "%s", lastError());
}

}  // namespace mxc::trt
