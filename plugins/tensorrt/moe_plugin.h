// MoE and QMoE with the inputs and attributes of com.microsoft::MoE and com.microsoft::QMoE, as far as the kernels go:
// interleaved SwiGLU (swiglu_fusion=1, alpha 1, beta 0, no limit), no biases, no third matrix; QMoE with int8 weights
// and one scale per output row.
//
// N tokens (x may be [N, D] or [B, T, D]), D hidden, E experts routed over, L experts held here (L = E unless
// `first_local_expert` names a range), I expert inner width. Inputs:
//   MoE    input, router_probs [N, E] (logits), fc1 [L, 2I, D], fc1_bias, fc2 [L, D, I]
//   QMoE   input, router_probs, fc1 int8, fc1_scales [L, 2I], fc1_bias, fc2 int8, fc2_scales [L, D]
// and then further optional ones. TensorRT's plugins know no absent inputs, so an input that is absent in ONNX is given
// as a tensor with no elements; so are all optional inputs here.
//
// TensorRT-RTX's parser handles op QMoE itself (4 bits only): models name this plugin QMoEInt8, and both names are
// registered.
#pragma once

#include "moe/moe.h"
#include "tensorrt/base_plugin.h"

namespace mxc::trt {

struct MoeConfig {
    int32_t top_k = 1;
    int32_t normalize = 0;
    int32_t first_local = 0;
    bool quantized = false;
};

class MoePlugin : public BasePlugin {
  public:
    static std::vector<nvinfer1::PluginField> fieldNames(bool quantized);
    static nvinfer1::IPluginV3* create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields, bool quantized);

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
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nb_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t nb_outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nb_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t nb_outputs) const noexcept override;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t nb_inputs,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t nb_outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

  protected:
    void writeFields(FieldWriter& fields) const override;

  private:
    friend class BasePlugin;
    MoePlugin(const char* op, std::string node, MoeConfig config) : BasePlugin(op, std::move(node)), config_(config) {}

    // Positions of the inputs the kernels read.
    struct Inputs {
        int32_t fc1, fc1_scale, fc2, fc2_scale, required;
    };
    Inputs positions() const noexcept;
    // The kernels' view of the shapes; -1 where not known yet. Reports what is wrong.
    int32_t checkShape(const nvinfer1::Dims* dims, int32_t nb_inputs) const noexcept;
    MoeParams largest(const nvinfer1::DynamicPluginTensorDesc* inputs) const noexcept;
    MoeParams params(const nvinfer1::Dims& x, const nvinfer1::Dims& router, const nvinfer1::Dims& fc1,
                     const nvinfer1::Dims& fc2) const noexcept;
    void setTypes(MoeParams& params, nvinfer1::DataType x, nvinfer1::DataType router,
                  nvinfer1::DataType scale) const noexcept;

    MoeConfig config_;
};

// The two names a creator needs (see base_plugin.h).
class FloatMoePlugin {
  public:
    static std::vector<nvinfer1::PluginField> fieldNames() { return MoePlugin::fieldNames(false); }
    static nvinfer1::IPluginV3* create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields) {
        return MoePlugin::create(op, node, fields, false);
    }
};

class QuantizedMoePlugin {
  public:
    static std::vector<nvinfer1::PluginField> fieldNames() { return MoePlugin::fieldNames(true); }
    static nvinfer1::IPluginV3* create(const char* op, const std::string& node,
                                       const nvinfer1::PluginFieldCollection* fields) {
        return MoePlugin::create(op, node, fields, true);
    }
};

}  // namespace mxc::trt
