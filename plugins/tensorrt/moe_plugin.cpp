#include "tensorrt/moe_plugin.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "mxc/architectures.h"

namespace mxc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginFieldType;

constexpr int32_t kX = 0;
constexpr int32_t kRouter = 1;
constexpr int32_t kMaxInputs = 16;  // com.microsoft::QMoE has 15
constexpr int32_t kMaxTopK = 8;

constexpr const char* kMoeInputs[] = {"input", "router_probs", "fc1_experts_weights", "fc1_experts_bias",
                                      "fc2_experts_weights"};
constexpr const char* kQMoeInputs[] = {"input",      "router_probs",     "fc1_experts_weights",
                                       "fc1_scales", "fc1_experts_bias", "fc2_experts_weights",
                                       "fc2_scales"};

// 0 where some dimension is 0, -1 where that cannot be told yet, else 1 or more.
int64_t volume(const Dims& dims) noexcept {
    int64_t volume = 1;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        if (dims.d[axis] == 0) return 0;
        volume = dims.d[axis] < 0 || volume < 0 ? -1 : volume * dims.d[axis];
    }
    return volume;
}

bool fits(int64_t have, int64_t want) noexcept { return have < 0 || want < 0 || have == want; }

}  // namespace

MoePlugin::Inputs MoePlugin::positions() const noexcept {
    return config_.quantized ? Inputs{2, 3, 5, 6, 7} : Inputs{2, -1, 4, -1, 5};
}

std::vector<nvinfer1::PluginField> MoePlugin::fieldNames(bool quantized) {
    std::vector<nvinfer1::PluginField> names = {{"k", nullptr, PluginFieldType::kINT32, 1},
                                                {"activation_type", nullptr, PluginFieldType::kCHAR, 1},
                                                {"activation_alpha", nullptr, PluginFieldType::kFLOAT32, 1},
                                                {"activation_beta", nullptr, PluginFieldType::kFLOAT32, 1},
                                                {"swiglu_fusion", nullptr, PluginFieldType::kINT32, 1},
                                                {"swiglu_limit", nullptr, PluginFieldType::kFLOAT32, 1},
                                                {"normalize_routing_weights", nullptr, PluginFieldType::kINT32, 1},
                                                {"use_sparse_mixer", nullptr, PluginFieldType::kINT32, 1},
                                                {"first_local_expert", nullptr, PluginFieldType::kINT32, 1}};
    if (quantized) {
        names.push_back({"expert_weight_bits", nullptr, PluginFieldType::kINT32, 1});
        names.push_back({"block_size", nullptr, PluginFieldType::kINT32, 1});
    }
    return names;
}

nvinfer1::IPluginV3* MoePlugin::create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields, bool quantized) {
    std::string name = node;
    MoeConfig config;
    config.quantized = quantized;
    std::string activation = "relu";  // the op's own default, as are the values below
    float alpha = 1.0f;
    float beta = 0.0f;
    float limit = std::numeric_limits<float>::infinity();
    int32_t fusion = 0;
    int32_t sparse_mixer = 0;
    int32_t bits = quantized ? 4 : 8;
    int32_t block = 0;
    FieldReader reader =
        quantized ? FieldReader(op, node, fields,
                                {"k", "activation_type", "activation_alpha", "activation_beta", "swiglu_fusion",
                                 "swiglu_limit", "normalize_routing_weights", "use_sparse_mixer", "first_local_expert",
                                 "expert_weight_bits", "block_size", kNodeField})
                  : FieldReader(
                        op, node, fields,
                        {"k", "activation_type", "activation_alpha", "activation_beta", "swiglu_fusion", "swiglu_limit",
                         "normalize_routing_weights", "use_sparse_mixer", "first_local_expert", kNodeField});
    reader.read("k", config.top_k);
    reader.read("activation_type", activation);
    reader.read("activation_alpha", alpha);
    reader.read("activation_beta", beta);
    reader.read("swiglu_fusion", fusion);
    reader.read("swiglu_limit", limit);
    reader.read("normalize_routing_weights", config.normalize);
    reader.read("use_sparse_mixer", sparse_mixer);
    reader.read("first_local_expert", config.first_local);
    reader.read("expert_weight_bits", bits);
    reader.read("block_size", block);
    reader.read(kNodeField, name);
    if (!reader.ok()) return nullptr;
    if (config.top_k < 1 || config.top_k > kMaxTopK) {
        reportError(op, name, "k is %d; give 1 to %d", config.top_k, kMaxTopK);
    } else if (activation != "swiglu" || fusion != 1) {
        reportError(op, name, "activation_type '%s' with swiglu_fusion %d is not supported; only 'swiglu' with 1 is",
                    activation.c_str(), fusion);
    } else if (alpha != 1.0f || beta != 0.0f || std::isfinite(limit)) {
        reportError(op, name,
                    "activation_alpha %g, activation_beta %g, swiglu_limit %g: only 1, 0 and no limit are supported",
                    static_cast<double>(alpha), static_cast<double>(beta), static_cast<double>(limit));
    } else if (sparse_mixer != 0) {
        reportError(op, name, "use_sparse_mixer is not supported");
    } else if (config.first_local < 0) {
        reportError(op, name, "first_local_expert is %d; it must not be negative", config.first_local);
    } else if (bits != 8) {
        reportError(op, name, "expert_weight_bits is %d; only 8 is supported", bits);
    } else if (block > 0) {
        reportError(op, name, "block_size is %d; only one scale per output row (no block_size) is supported", block);
    } else {
        return new MoePlugin(op, std::move(name), config);
    }
    return nullptr;
}

void MoePlugin::writeFields(FieldWriter& fields) const {
    static const std::string kActivation = "swiglu";
    static const int32_t kFusion = 1;
    static const int32_t kBits = 8;
    fields.add("k", config_.top_k);
    fields.add("activation_type", kActivation);
    fields.add("swiglu_fusion", kFusion);
    fields.add("normalize_routing_weights", config_.normalize);
    fields.add("first_local_expert", config_.first_local);
    if (config_.quantized) fields.add("expert_weight_bits", kBits);
}

int32_t MoePlugin::getOutputDataTypes(DataType* outputs, int32_t nb_outputs, const DataType* inputs,
                                      int32_t nb_inputs) const noexcept {
    const Inputs at = positions();
    if (nb_inputs < at.required || nb_inputs > kMaxInputs || nb_outputs != 1) {
        return reportError(
            op_, node_,
            "it has %d inputs; %d to %d expected, in the order of com.microsoft::%s, with a tensor of no "
            "elements for an absent one",
            nb_inputs, at.required, kMaxInputs, config_.quantized ? "QMoE" : "MoE");
    }
    const DataType x = inputs[kX];
    if (!isActivation(x)) return reportError(op_, node_, "input is %s; give fp16 or bf16", typeName(x));
    if (inputs[kRouter] != DataType::kFLOAT && inputs[kRouter] != x) {
        return reportError(op_, node_, "router_probs is %s; give fp32 or the type of input", typeName(inputs[kRouter]));
    }
    const DataType weight = config_.quantized ? DataType::kINT8 : x;
    for (const int32_t input : {at.fc1, at.fc2}) {
        if (inputs[input] != weight) {
            return reportError(op_, node_, "%s is %s; %s expected",
                               config_.quantized ? kQMoeInputs[input] : kMoeInputs[input], typeName(inputs[input]),
                               typeName(weight));
        }
    }
    if (config_.quantized) {
        if (inputs[at.fc1_scale] != inputs[at.fc2_scale] ||
            (inputs[at.fc1_scale] != x && inputs[at.fc1_scale] != DataType::kFLOAT)) {
            return reportError(op_, node_,
                               "fc1_scales is %s and fc2_scales %s; give both in fp32 or in the type of input",
                               typeName(inputs[at.fc1_scale]), typeName(inputs[at.fc2_scale]));
        }
    }
    outputs[0] = x;
    return 0;
}

int32_t MoePlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs, const nvinfer1::DimsExprs*,
                                   int32_t, nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                                   nvinfer1::IExprBuilder&) noexcept {
    if (nb_inputs < positions().required || nb_inputs > kMaxInputs || nb_outputs != 1) return -1;
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < nb_inputs; ++i) {
        dims[i].nbDims = inputs[i].nbDims;
        for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) dims[i].d[axis] = constantDim(inputs[i], axis);
    }
    if (checkShape(dims, nb_inputs) != 0) return -1;
    outputs[0] = inputs[kX];
    return 0;
}

int32_t MoePlugin::checkShape(const Dims* dims, int32_t nb_inputs) const noexcept {
    const Inputs at = positions();
    const auto name = [&](int32_t input) { return config_.quantized ? kQMoeInputs[input] : kMoeInputs[input]; };
    for (int32_t input = 0; input < nb_inputs; ++input) {
        if (input == kX || input == kRouter || input == at.fc1 || input == at.fc2 || input == at.fc1_scale ||
            input == at.fc2_scale) {
            continue;
        }
        if (volume(dims[input]) != 0) {
            return reportError(op_, node_, "input %d (%s) is not supported; give a tensor of no elements for absent",
                               input, input < at.required ? name(input) : "optional");
        }
    }
    const Dims& x = dims[kX];
    const Dims& router = dims[kRouter];
    const Dims& fc1 = dims[at.fc1];
    const Dims& fc2 = dims[at.fc2];
    if (x.nbDims != 2 && x.nbDims != 3)
        return reportError(op_, node_, "input has %d dimensions; give [N, D] or [B, T, D]", x.nbDims);
    if (router.nbDims < 2) return reportError(op_, node_, "router_probs has %d dimensions; give [N, E]", router.nbDims);
    for (const int32_t input : {at.fc1, at.fc2}) {
        if (dims[input].nbDims != 3) {
            return reportError(op_, node_, "%s has %d dimensions; give %s", name(input), dims[input].nbDims,
                               input == at.fc1 ? "[E, 2 * inner, hidden]" : "[E, hidden, inner]");
        }
    }
    const int64_t hidden = x.d[x.nbDims - 1];
    const int64_t experts = router.d[router.nbDims - 1];
    const int64_t local = fc1.d[0];
    const int64_t inner = fc2.d[2];
    if (hidden < 0 || experts < 0 || local < 0 || inner < 0) {
        return reportError(op_, node_, "hidden size, number of experts and expert width must be static");
    }
    if (!fits(fc1.d[2], hidden) || !fits(fc2.d[1], hidden) || !fits(fc1.d[1], 2 * inner) || !fits(fc2.d[0], local)) {
        return reportError(op_, node_,
                           "fc1 [%lld, %lld, %lld] and fc2 [%lld, %lld, %lld] do not go with hidden size %lld: "
                           "[E, 2 * inner, hidden] and [E, hidden, inner] expected",
                           static_cast<long long>(fc1.d[0]), static_cast<long long>(fc1.d[1]),
                           static_cast<long long>(fc1.d[2]), static_cast<long long>(fc2.d[0]),
                           static_cast<long long>(fc2.d[1]), static_cast<long long>(fc2.d[2]),
                           static_cast<long long>(hidden));
    }
    if (config_.top_k > experts) {
        return reportError(op_, node_, "k is %d, more than the %lld experts", config_.top_k,
                           static_cast<long long>(experts));
    }
    if (config_.first_local + local > experts) {
        return reportError(op_, node_, "experts %d to %lld are held here, but router_probs has %lld",
                           config_.first_local, static_cast<long long>(config_.first_local + local - 1),
                           static_cast<long long>(experts));
    }
    const int64_t tokens = volume(x) < 0 ? -1 : leadingVolume(x, 1);
    const int64_t routed = volume(router) < 0 ? -1 : leadingVolume(router, 1);
    if (!fits(tokens, routed)) {
        return reportError(op_, node_, "input has %lld tokens and router_probs %lld", static_cast<long long>(tokens),
                           static_cast<long long>(routed));
    }
    if (tokens > std::numeric_limits<int32_t>::max()) return reportError(op_, node_, "more than 2^31 - 1 tokens");
    if (config_.quantized) {
        const Dims& scale1 = dims[at.fc1_scale];
        const Dims& scale2 = dims[at.fc2_scale];
        if (scale1.nbDims != 2 || scale2.nbDims != 2 || !fits(scale1.d[0], local) || !fits(scale1.d[1], 2 * inner) ||
            !fits(scale2.d[0], local) || !fits(scale2.d[1], hidden)) {
            return reportError(op_, node_,
                               "fc1_scales must be [%lld, %lld] and fc2_scales [%lld, %lld]: one per output row",
                               static_cast<long long>(local), static_cast<long long>(2 * inner),
                               static_cast<long long>(local), static_cast<long long>(hidden));
        }
    }
    return 0;
}

bool MoePlugin::supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                          int32_t nb_inputs, int32_t) noexcept {
    const Inputs at = positions();
    const nvinfer1::PluginTensorDesc& desc = tensors[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const DataType x = tensors[kX].desc.type;
    if (pos == kX) return isActivation(desc.type);
    if (pos == nb_inputs) return desc.type == x;
    if (pos == kRouter) return desc.type == x || desc.type == DataType::kFLOAT;
    if (pos == at.fc1 || pos == at.fc2) return desc.type == (config_.quantized ? DataType::kINT8 : x);
    if (pos == at.fc1_scale) return desc.type == x || desc.type == DataType::kFLOAT;
    if (pos == at.fc2_scale) return desc.type == tensors[at.fc1_scale].desc.type;
    return true;  // an absent input: never read
}

MoeParams MoePlugin::params(const Dims& x, const Dims& router, const Dims& fc1, const Dims& fc2) const noexcept {
    MoeParams params;
    params.tokens = static_cast<int32_t>(leadingVolume(x, 1));
    params.hidden = static_cast<int32_t>(x.d[x.nbDims - 1]);
    params.inner = static_cast<int32_t>(fc2.d[2]);
    params.experts = static_cast<int32_t>(router.d[router.nbDims - 1]);
    params.top_k = config_.top_k;
    params.first_local = config_.first_local;
    params.local_experts = static_cast<int32_t>(fc1.d[0]);
    params.normalize = config_.normalize != 0;
    return params;
}

void MoePlugin::setTypes(MoeParams& params, DataType x, DataType router, DataType scale) const noexcept {
    params.dtype = toDType(x);
    params.router_dtype = toDType(router);
    params.weight_dtype = config_.quantized ? DType::kInt8 : params.dtype;
    params.scale_dtype = toDType(scale);
}

MoeParams MoePlugin::largest(const nvinfer1::DynamicPluginTensorDesc* inputs) const noexcept {
    const Inputs at = positions();
    MoeParams most = params(inputs[kX].max, inputs[kRouter].max, inputs[at.fc1].max, inputs[at.fc2].max);
    setTypes(most, inputs[kX].desc.type, inputs[kRouter].desc.type,
             config_.quantized ? inputs[at.fc1_scale].desc.type : DataType::kFLOAT);
    return most;
}

int32_t MoePlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                   const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept {
    MoeParams most = largest(inputs);
    most.tokens = std::max(most.tokens, 1);  // no tokens need no workspace either
    if (moeWorkspaceBytes(most) == 0) return reportError(op_, node_, "%s", lastError());
    return 0;
}

size_t MoePlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                   const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
    return moeWorkspaceBytes(largest(inputs));
}

int32_t MoePlugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                                 const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
    if (nb_inputs < positions().required || nb_inputs > kMaxInputs) return -1;
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < nb_inputs; ++i) dims[i] = inputs[i].dims;
    return checkShape(dims, nb_inputs);
}

int32_t MoePlugin::enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc*,
                           const void* const* inputs, void* const* outputs, void* workspace,
                           cudaStream_t stream) noexcept {
    const Inputs at = positions();
    MoeParams now =
        params(input_desc[kX].dims, input_desc[kRouter].dims, input_desc[at.fc1].dims, input_desc[at.fc2].dims);
    setTypes(now, input_desc[kX].type, input_desc[kRouter].type,
             config_.quantized ? input_desc[at.fc1_scale].type : DataType::kFLOAT);
    now.x_ND = inputs[kX];
    now.router_logits_NE = inputs[kRouter];
    now.fc1_E2ID = inputs[at.fc1];
    now.fc2_EDI = inputs[at.fc2];
    now.fc1_scale_E2I = config_.quantized ? inputs[at.fc1_scale] : nullptr;
    now.fc2_scale_ED = config_.quantized ? inputs[at.fc2_scale] : nullptr;
    now.out_ND = outputs[0];
    now.workspace = workspace;
    now.workspace_bytes = moeWorkspaceBytes(now);
    const Status status = explainCudaFailure(launchMoe(now, stream), "moe");
    return status == Status::kOk ? 0 : reportError(op_, node_, "%s", lastError());
}

}  // namespace mxc::trt
