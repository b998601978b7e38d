// Tensor maps of the copy engine, made by the driver's cuTensorMapEncodeTiled (or by a test's in its place).
#pragma once

#include <cuda.h>

#include "row_boxes.h"

namespace mxc {

// `rows`: q, k, v or out of `params`, 16-bit; a box holds `tokens` tokens. The 128-byte swizzle is swizzledOffset's
// (mxc/hopper.cuh); what a box has past the tensor is read as zeros and not written.
template <class Encode>
CUresult encodeRowMap(Encode&& encode, CUtensorMap& map, const uint16_t* rows, const LightningParams& params,
                      int tokens) noexcept {
    const RowBoxes boxes = rowBoxes(params, tokens);
    cuuint64_t size[4], stride[3];
    cuuint32_t box[4], step[4];
    for (int i = 0; i < 4; ++i) {
        size[i] = boxes.size[i];
        box[i] = boxes.box[i];
        step[i] = 1;
        if (i < 3) stride[i] = boxes.stride[i];
    }
    const auto type =
        params.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encode(&map, type, 4, const_cast<uint16_t*>(rows), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace mxc
