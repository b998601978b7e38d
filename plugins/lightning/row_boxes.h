// The copy engine's view of q, k, v and out: boxes of 64 columns and some tokens of one head. No CUDA calls.
#pragma once

#include <cstdint>

#include "lightning_attention.h"

namespace mxc {

// Dimensions of [B, T, H, 128] in 16-bit elements, the fastest first: column, head, token, sequence.
struct RowBoxes {
    uint64_t size[4];    // elements
    uint64_t stride[3];  // bytes, of the second dimension on
    uint32_t box[4];     // elements: 64 columns are the 128 bytes of a swizzled row
};

// Shapes as checkLightning has let them through.
inline RowBoxes rowBoxes(const LightningParams& params, int tokens) noexcept {
    const auto unsign = [](int32_t size) { return static_cast<uint64_t>(size); };
    const uint64_t row = 2 * 128, token = row * unsign(params.heads);
    return {{128, unsign(params.heads), unsign(params.tokens), unsign(params.batch)},
            {row, token, token * unsign(params.tokens)},
            {64, 1, static_cast<uint32_t>(tokens), 1}};
}

}  // namespace mxc
