// SoftmaxAttention: causal attention over a key/value cache that knows its lengths, which TensorRT's parser drops from
// the standard op. Inputs: query [B, H, T, K], key_cache and value_cache [B, G, S, K] (fp16 or bf16, the new tokens
// already written), past_lengths and new_lengths [B] (int32 or int64). Output as query; zeros past the new length.
// Field: scale (0, the default, means 1 / sqrt(K)). K is 64 or 128, H a multiple of G.
#pragma once

#include "attention/softmax_attention.h"
#include "tensorrt/base_plugin.h"

namespace mxc::trt {

class SoftmaxAttentionPlugin final : public BasePlugin {
  public:
    static std::vector<nvinfer1::PluginField> fieldNames();
    static nvinfer1::IPluginV3* create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields);

    nvinfer1::IPluginV3* clone() noexcept override { return copy(*this); }
    int32_t getNbOutputs() const noexcept override { return 1; }
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
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t nb_outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

  protected:
    void writeFields(FieldWriter& fields) const override { fields.add("scale", scale_); }

  private:
    friend class BasePlugin;
    SoftmaxAttentionPlugin(const char* op, std::string node, float scale)
        : BasePlugin(op, std::move(node)), scale_(scale) {}

    int32_t checkShape(const nvinfer1::Dims* dims) const noexcept;

    float scale_;
};

}  // namespace mxc::trt
