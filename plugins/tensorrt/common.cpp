#include "tensorrt/common.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

namespace mxc::trt {

// TensorRT's logger and the finder that leads to it, as the runtime that loaded us lays them out. TensorRT 11 and
// TensorRT-RTX 1.7 made both versioned interfaces, so a library compiled with the headers of TensorRT 10 must not call
// them through those headers: it would call other functions of theirs. Not in an anonymous namespace: there the
// compiler sees that nothing here implements them and makes each call one of a pure virtual function.
struct PlainFinder {
    virtual void* findLogger() = 0;
};
struct PlainLogger {
    virtual void log(int32_t severity, const char* text) noexcept = 0;
};
struct VersionedFinder : nvinfer1::IVersionedInterface {
    virtual void* findLogger() = 0;
};
struct VersionedLogger : nvinfer1::IVersionedInterface {
    virtual void log(int32_t severity, const char* text) noexcept = 0;
};

namespace {

constexpr int32_t kErrorSeverity = 1;

struct Runtime {
    void* finder = nullptr;
    void* (*get_logger)() = nullptr;  // TensorRT's own; while a network is parsed the finder knows no logger
    bool versioned = false;
};

Runtime g_runtime;
std::atomic<bool> g_state_aliasing{false};

void logError(const char* line) noexcept {
    void* logger = nullptr;
    if (g_runtime.finder != nullptr) {
        logger = g_runtime.versioned ? static_cast<VersionedFinder*>(g_runtime.finder)->findLogger()
                                     : static_cast<PlainFinder*>(g_runtime.finder)->findLogger();
    }
    if (logger == nullptr && g_runtime.get_logger != nullptr) logger = g_runtime.get_logger();
    if (logger == nullptr) {
        std::fprintf(stderr, "%s\n", line);
    } else if (g_runtime.versioned) {
        static_cast<VersionedLogger*>(logger)->log(kErrorSeverity, line);
    } else {
        static_cast<PlainLogger*>(logger)->log(kErrorSeverity, line);
    }
}

}  // namespace

void setLoggerFinder(void* finder) noexcept {
    g_runtime = Runtime{};
    // Which TensorRT loaded us is told by where the code of its finder lies.
    Dl_info library{};
    if (finder == nullptr || dladdr(*static_cast<void**>(finder), &library) == 0) return;
    void* handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return;
    const auto major = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibMajorVersion"));
    if (major != nullptr) {
        constexpr int32_t kRtx = 1;  // this package asks for 1.7 or later
        g_runtime.versioned = major() >= 11 || major() == kRtx;
        g_runtime.finder = finder;
        g_runtime.get_logger = reinterpret_cast<void* (*)()>(dlsym(handle, "getLogger"));
    }
    dlclose(handle);  // only undoes this dlopen
}

void setStateAliasing(bool on) noexcept { g_state_aliasing = on; }

bool stateAliasing() noexcept { return g_state_aliasing; }

int32_t reportError(const char* op, const std::string& node, const char* format, ...) noexcept {
    char text[640];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    char line[1024];
    std::snprintf(line, sizeof(line), "%s '%s': %s", op, node.c_str(), text);
    logError(line);
    return -1;
}

FieldReader::FieldReader(const char* op, std::string node, const nvinfer1::PluginFieldCollection* fields,
                         std::initializer_list<const char*> known) noexcept
    : op_(op), node_(std::move(node)), fields_(fields) {
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        bool found = false;
        for (const char* name : known) found = found || std::strcmp(name, fields->fields[i].name) == 0;
        if (!found) {
            reportError(op_, node_, "unknown field '%s'", fields->fields[i].name);
            ok_ = false;
            return;
        }
    }
}

const nvinfer1::PluginField* FieldReader::find(const char* name, bool required) noexcept {
    if (!ok_) return nullptr;
    for (int32_t i = 0; fields_ != nullptr && i < fields_->nbFields; ++i) {
        if (std::strcmp(fields_->fields[i].name, name) == 0) return &fields_->fields[i];
    }
    if (required) {
        reportError(op_, node_, "field '%s' is missing", name);
        ok_ = false;
    }
    return nullptr;
}

void FieldReader::fail(const char* name, const char* wanted) noexcept {
    reportError(op_, node_, "field '%s' must be %s", name, wanted);
    ok_ = false;
}

void FieldReader::read(const char* name, int32_t& value, bool required) noexcept {
    const nvinfer1::PluginField* field = find(name, required);
    if (field == nullptr) return;
    if (field->length != 1 || field->data == nullptr) return fail(name, "one integer");
    if (field->type == nvinfer1::PluginFieldType::kINT32) {
        std::memcpy(&value, field->data, sizeof(value));
        return;
    }
    if (field->type == nvinfer1::PluginFieldType::kINT64) {
        int64_t wide = 0;
        std::memcpy(&wide, field->data, sizeof(wide));
        value = static_cast<int32_t>(wide);
        if (value != wide) fail(name, "a 32-bit integer");
        return;
    }
    fail(name, "one integer");
}

void FieldReader::read(const char* name, float& value) noexcept {
    const nvinfer1::PluginField* field = find(name, false);
    if (field == nullptr) return;
    if (field->length != 1 || field->data == nullptr || field->type != nvinfer1::PluginFieldType::kFLOAT32) {
        return fail(name, "one fp32 number");
    }
    std::memcpy(&value, field->data, sizeof(value));
}

void FieldReader::read(const char* name, std::string& value) noexcept {
    const nvinfer1::PluginField* field = find(name, false);
    if (field == nullptr) return;
    if (field->type != nvinfer1::PluginFieldType::kCHAR || field->length < 0 ||
        (field->length > 0 && field->data == nullptr)) {
        return fail(name, "a text");
    }
    // The parser passes some texts with a terminating zero (counted in the length) and some without.
    const char* text = static_cast<const char*>(field->data);
    value.assign(text, strnlen(text, static_cast<size_t>(field->length)));
}

void FieldWriter::add(const char* name, const int32_t& value) {
    fields_.emplace_back(name, &value, nvinfer1::PluginFieldType::kINT32, 1);
}

void FieldWriter::add(const char* name, const float& value) {
    fields_.emplace_back(name, &value, nvinfer1::PluginFieldType::kFLOAT32, 1);
}

void FieldWriter::add(const char* name, const std::string& value) {
    // With the terminating zero, so that an empty text still has data.
    fields_.emplace_back(name, value.c_str(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size()) + 1);
}

const nvinfer1::PluginFieldCollection* FieldWriter::collection() noexcept {
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
}

const char* typeName(nvinfer1::DataType type) noexcept {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return "fp32";
        case nvinfer1::DataType::kHALF:
            return "fp16";
        case nvinfer1::DataType::kBF16:
            return "bf16";
        case nvinfer1::DataType::kINT8:
            return "int8";
        case nvinfer1::DataType::kUINT8:
            return "uint8";
        case nvinfer1::DataType::kINT32:
            return "int32";
        case nvinfer1::DataType::kINT64:
            return "int64";
        case nvinfer1::DataType::kBOOL:
            return "bool";
        default:
            return "another type";
    }
}

bool isActivation(nvinfer1::DataType type) noexcept {
    return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

DType toDType(nvinfer1::DataType type) noexcept {
    switch (type) {
        case nvinfer1::DataType::kHALF:
            return DType::kFloat16;
        case nvinfer1::DataType::kBF16:
            return DType::kBFloat16;
        case nvinfer1::DataType::kINT8:
            return DType::kInt8;
        default:
            return DType::kFloat32;
    }
}

int64_t constantDim(const nvinfer1::DimsExprs& dims, int32_t axis) noexcept {
    const nvinfer1::IDimensionExpr* dim = dims.d[axis];
    return dim != nullptr && dim->isConstant() ? static_cast<int64_t>(dim->getConstantValue()) : -1;
}

int64_t leadingVolume(const nvinfer1::Dims& dims, int32_t kept) noexcept {
    int64_t volume = 1;
    for (int32_t i = 0; i < dims.nbDims - kept; ++i) volume *= dims.d[i];
    return volume;
}

size_t alignUp(size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }

}  // namespace mxc::trt
