// What the TensorRT plugins share: error reports that name op and node, fields, and checks of tensors.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "mxc/types.h"

namespace mxc::trt {

// TensorRT gives the way to its logger (an nvinfer1::ILoggerFinder) when it loads the library; without one errors go to
// stderr.
void setLoggerFinder(void* finder) noexcept;

// Whether plugins tell TensorRT, while an engine is built, that a present state lives where the past one does. Off
// until asked for: TensorRT-RTX 1.7 refuses to build such a plugin unless the builder allows aliased plugin I/O,
// whatever its documentation says. Off does not forbid working in place: the kernels do so where both are bound to one
// address.
void setStateAliasing(bool on) noexcept;
bool stateAliasing() noexcept;

// Logs "LinearAttention 'layers.3.attention': <text>" as a TensorRT error. Returns -1, for `return reportError(...)`.
int32_t reportError(const char* op, const std::string& node, const char* format, ...) noexcept
    __attribute__((format(printf, 3, 4)));

// Reads the fields of a creator. The first thing wrong is logged and ok() turns false; later reads are then no-ops.
class FieldReader {
  public:
    // `known` are the names a creator takes; any other name in `fields` is an error.
    FieldReader(const char* op, std::string node, const nvinfer1::PluginFieldCollection* fields,
                std::initializer_list<const char*> known) noexcept;

    // Each leaves `value` as it is where the field is absent and not required.
    void read(const char* name, int32_t& value, bool required = false) noexcept;
    void read(const char* name, float& value) noexcept;
    void read(const char* name, std::string& value) noexcept;
    bool ok() const noexcept { return ok_; }

  private:
    const nvinfer1::PluginField* find(const char* name, bool required) noexcept;
    void fail(const char* name, const char* wanted) noexcept;

    const char* op_;
    std::string node_;
    const nvinfer1::PluginFieldCollection* fields_;
    bool ok_ = true;
};

// Collects fields for serialization; views the values, which must outlive it.
class FieldWriter {
  public:
    void clear() noexcept { fields_.clear(); }
    void add(const char* name, const int32_t& value);
    void add(const char* name, const float& value);
    void add(const char* name, const std::string& value);
    const nvinfer1::PluginFieldCollection* collection() noexcept;

  private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

const char* typeName(nvinfer1::DataType type) noexcept;

// fp16 and bf16 (what the kernels compute in).
bool isActivation(nvinfer1::DataType type) noexcept;

// Of fp32, fp16, bf16 and int8; kFloat32 for any other (checked before).
DType toDType(nvinfer1::DataType type) noexcept;

// The value of a dimension that is known while the network is built, or -1.
int64_t constantDim(const nvinfer1::DimsExprs& dims, int32_t axis) noexcept;

// Product of all dimensions but the last `kept`.
int64_t leadingVolume(const nvinfer1::Dims& dims, int32_t kept) noexcept;

size_t alignUp(size_t bytes) noexcept;

}  // namespace mxc::trt
