// The part of an IPluginV3 that every plugin of this library has in common, and its creator.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>
#include <vector>

#include "tensorrt/common.h"

namespace mxc::trt {

constexpr const char* kNodeField = "node_name";  // only in serialized plugins: errors at run time name the node too

// A plugin derives from this, copies itself in clone() and adds its fields in writeFields().
class BasePlugin : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuildV2,
                   public nvinfer1::IPluginV3OneRuntime {
  public:
    BasePlugin(const char* op, std::string node) : op_(op), node_(std::move(node)) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        if (type == nvinfer1::PluginCapabilityType::kBUILD) return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        if (type == nvinfer1::PluginCapabilityType::kRUNTIME) return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    }

    const char* getPluginName() const noexcept override { return op_; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return ""; }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                            int32_t) noexcept override {
        return 0;
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        try {
            fields_.clear();
            writeFields(fields_);
            fields_.add(kNodeField, node_);
            return fields_.collection();
        } catch (const std::exception& error) {
            reportError(op_, node_, "cannot serialize: %s", error.what());
            return nullptr;
        }
    }

  protected:
    virtual void writeFields(FieldWriter& fields) const = 0;

    // nullptr, with a report, where memory is short.
    template <typename Plugin>
    static nvinfer1::IPluginV3* copy(const Plugin& plugin) noexcept {
        try {
            return new Plugin(plugin);
        } catch (const std::exception& error) {
            reportError(plugin.op_, plugin.node_, "cannot copy: %s", error.what());
            return nullptr;
        }
    }

    const char* op_;
    std::string node_;

  private:
    FieldWriter fields_;
};

// Creator of `Plugin`, which has `static IPluginV3* create(op, node, fields) noexcept` and
// `static std::vector<PluginField> fieldNames()`.
template <typename Plugin>
class Creator : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit Creator(const char* op) : op_(op), names_(Plugin::fieldNames()) {
        collection_.nbFields = static_cast<int32_t>(names_.size());
        collection_.fields = names_.data();
    }

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        try {
            return Plugin::create(op_, name == nullptr ? "" : name, fields);
        } catch (const std::exception& error) {
            reportError(op_, name == nullptr ? "" : name, "cannot create: %s", error.what());
            return nullptr;
        }
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return op_; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return ""; }

  private:
    const char* op_;
    std::vector<nvinfer1::PluginField> names_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace mxc::trt
