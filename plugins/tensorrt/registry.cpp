// What TensorRT's registry loader (IPluginRegistry::loadLibrary) and plugins/tensorrt_runtime.py look for.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include "tensorrt/linear_attention_plugin.h"
#include "tensorrt/moe_plugin.h"
#include "tensorrt/softmax_attention_plugin.h"

#define MXC_EXPORT extern "C" __attribute__((visibility("default")))

MXC_EXPORT void setLoggerFinder(void* finder) { mxc::trt::setLoggerFinder(finder); }

MXC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static mxc::trt::Creator<mxc::trt::LinearAttentionPlugin> linear_attention("LinearAttention");
    static mxc::trt::Creator<mxc::trt::FloatMoePlugin> moe("MoE");
    static mxc::trt::Creator<mxc::trt::QuantizedMoePlugin> qmoe("QMoE");
    static mxc::trt::Creator<mxc::trt::QuantizedMoePlugin> qmoe_int8("QMoEInt8");
    static mxc::trt::Creator<mxc::trt::SoftmaxAttentionPlugin> softmax_attention("SoftmaxAttention");
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&linear_attention, &moe, &qmoe, &qmoe_int8,
                                                                  &softmax_attention};
    count = static_cast<int32_t>(sizeof(creators) / sizeof(creators[0]));
    return creators;
}

// 100 * major + minor of the TensorRT headers this library was compiled with.
MXC_EXPORT int32_t mxc_tensorrt_headers() { return 100 * NV_TENSORRT_MAJOR + NV_TENSORRT_MINOR; }

MXC_EXPORT void mxc_tensorrt_state_aliasing(int32_t on) { mxc::trt::setStateAliasing(on != 0); }
