// Plays TensorRT's part towards the plugin library where no GPU is: creates each plugin, serializes it, creates it
// again from what it serialized, and runs it, which must fail with a message. Prints "key=value" lines; tests/plugins
// reads them.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

using Fields = std::vector<PluginField>;

std::string describe(const PluginFieldCollection* fields) {
    std::string text;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        text += std::string(field.name) + ":";
        if (field.type == PluginFieldType::kINT32) text += std::to_string(*static_cast<const int32_t*>(field.data));
        if (field.type == PluginFieldType::kFLOAT32) text += std::to_string(*static_cast<const float*>(field.data));
        if (field.type == PluginFieldType::kCHAR) text += static_cast<const char*>(field.data);
        text += ";";
    }
    return text;
}

IPluginV3* create(IPluginCreatorV3One& creator, const char* node, const Fields& fields, TensorRTPhase phase) {
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator.createPlugin(node, &collection, phase);
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

PluginTensorDesc tensor(DataType type, std::vector<int64_t> dims) {
    PluginTensorDesc desc{};
    desc.type = type;
    desc.format = TensorFormat::kLINEAR;
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) desc.dims.d[i] = dims[i];
    return desc;
}

alignas(256) char g_memory[1 << 20];

void run(const char* name, IPluginCreatorV3One& creator, const Fields& fields, std::vector<PluginTensorDesc> inputs,
         std::vector<PluginTensorDesc> outputs) {
    IPluginV3* plugin = create(creator, "layers.3", fields, TensorRTPhase::kBUILD);
    if (plugin == nullptr) return;
    const std::string first = describe(runtime(plugin)->getFieldsToSerialize());
    IPluginV3* copy = plugin->clone();
    Fields written;
    const PluginFieldCollection* serialized = runtime(copy)->getFieldsToSerialize();
    for (int32_t i = 0; i < serialized->nbFields; ++i) written.push_back(serialized->fields[i]);
    // The name an engine gives its layer may be another than the node's.
    IPluginV3* again = create(creator, "engine layer", written, TensorRTPhase::kRUNTIME);
    std::printf("%s.fields=%s\n", name, first.c_str());
    std::printf("%s.round_trip=%d\n", name, first == describe(runtime(again)->getFieldsToSerialize()));
    delete copy;
    delete plugin;
    IPluginV3OneRuntime* ready = runtime(again);
    const int32_t shaped = ready->onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                                                static_cast<int32_t>(outputs.size()));
    std::vector<const void*> in;
    std::vector<void*> out;
    for (size_t i = 0; i < inputs.size(); ++i) in.push_back(g_memory + 65536 * i);
    for (size_t i = 0; i < outputs.size(); ++i) out.push_back(g_memory + 65536 * (inputs.size() + i));
    std::fflush(stdout);
    const int32_t status =
        ready->enqueue(inputs.data(), outputs.data(), in.data(), out.data(), g_memory + 917504, nullptr);
    std::printf("%s.shaped=%d\n%s.enqueue=%d\n", name, shaped, name, status);
    // Wrong at run time: one dimension less.
    inputs[0].dims.nbDims -= 1;
    std::printf("%s.wrong_rank=%d\n", name,
                ready->onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(), 1));
    delete again;
}

}  // namespace

int main(int, char** argv) {
    void* library = dlopen(argv[1], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* list = creators(count);
    const int32_t heads = 1, top_k = 2, one = 1, bits = 8;
    const float scale = 0.5f;
    const char gated[] = "gated", swiglu[] = "swiglu";
    const auto half = DataType::kHALF;
    const auto full = DataType::kFLOAT;
    for (int32_t i = 0; i < count; ++i) {
        auto& creator = *static_cast<IPluginCreatorV3One*>(list[i]);
        const std::string name = creator.getPluginName();
        std::printf("creator=%s/%s/%s\n", name.c_str(), creator.getPluginVersion(), creator.getPluginNamespace());
        if (name == "LinearAttention") {
            const Fields fields = {{"q_num_heads", &heads, PluginFieldType::kINT32, 1},
                                   {"kv_num_heads", &heads, PluginFieldType::kINT32, 1},
                                   {"update_rule", gated, PluginFieldType::kCHAR, 5},
                                   {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
            const auto rows = tensor(half, {1, 1, 64});
            const auto state = tensor(full, {1, 1, 64, 64});
            run("LinearAttention", creator, fields, {rows, rows, rows, state, tensor(full, {1, 1, 1})}, {rows, state});
            continue;
        }
        if (name == "SoftmaxAttention") {
            const auto query = tensor(half, {1, 2, 1, 64});
            const auto cache = tensor(half, {1, 1, 8, 64});
            const auto lengths = tensor(DataType::kINT64, {1});
            run("SoftmaxAttention", creator, {{"scale", &scale, PluginFieldType::kFLOAT32, 1}},
                {query, cache, cache, lengths, lengths}, {query});
            continue;
        }
        Fields fields = {{"k", &top_k, PluginFieldType::kINT32, 1},
                         {"activation_type", swiglu, PluginFieldType::kCHAR, 7},
                         {"swiglu_fusion", &one, PluginFieldType::kINT32, 1},
                         {"normalize_routing_weights", &one, PluginFieldType::kINT32, 1}};
        const auto x = tensor(half, {3, 16});
        const auto router = tensor(full, {3, 4});
        const auto none = tensor(half, {0});
        if (name == "MoE") {
            run("MoE", creator, fields, {x, router, tensor(half, {4, 32, 16}), none, tensor(half, {4, 16, 16})}, {x});
        } else if (name == "QMoEInt8") {
            fields.push_back({"expert_weight_bits", &bits, PluginFieldType::kINT32, 1});
            const auto byte = DataType::kINT8;
            run("QMoEInt8", creator, fields,
                {x, router, tensor(byte, {4, 32, 16}), tensor(full, {4, 32}), none, tensor(byte, {4, 16, 16}),
                 tensor(full, {4, 16})},
                {x});
        }
    }
    return 0;
}
