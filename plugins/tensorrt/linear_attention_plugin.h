// LinearAttention (ai.onnx 27 and com.microsoft) as TensorRT's ONNX parser asks for it: version "1", namespace "".
//
// Inputs, as the parser passes them: query, key, value [B, T, H*K] (fp16 or bf16), then optionally past_state [B, H, K,
// K] fp32 and decay [B, T, H] (fp32, or the type of query). Outputs: output [B, T, H*K] and present_state [B, H, K, K]
// fp32. Rules `linear` (no decay) and `gated`; one key/value head per query head; K 64 or 128.
#pragma once

#include "tensorrt/base_plugin.h"

namespace mxc::trt {

struct LinearAttentionConfig {
    int32_t heads = 0;
    bool gated = false;
    float scale = 0.0f;  // 0: 1 / sqrt(K), as the op defines it
    int32_t chunk_size = 0;
};

class LinearAttentionPlugin final : public BasePlugin {
  public:
    static std::vector<nvinfer1::PluginField> fieldNames();
    static nvinfer1::IPluginV3* create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields);

    nvinfer1::IPluginV3* clone() noexcept override { return copy(*this); }
    int32_t getNbOutputs() const noexcept override { return 2; }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nb_outputs, const nvinfer1::DataType* inputs,
                               int32_t nb_inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs,
                            const nvinfer1::DimsExprs* shape_inputs, int32_t nb_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t nb_inputs,
                                   int32_t nb_outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nb_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t nb_outputs) const noexcept override;
    // The present state may live where the past one does (see setStateAliasing).
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t nb_outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

  protected:
    void writeFields(FieldWriter& fields) const override;

  private:
    friend class BasePlugin;
    LinearAttentionPlugin(const char* op, std::string node, LinearAttentionConfig config, std::string rule)
        : BasePlugin(op, std::move(node)), config_(config), rule_(std::move(rule)) {}

    bool checkInputCount(int32_t nb_inputs) const noexcept;
    int32_t checkShape(const nvinfer1::Dims* dims, int32_t nb_inputs) const noexcept;

    LinearAttentionConfig config_;
    std::string rule_;
    // Learned in onShapeChange (enqueue is not told the number of inputs).
    int32_t inputs_ = 0;
};

}  // namespace mxc::trt
