// What the expert kernels share: finding the expert of a block, SwiGLU, scales, and which weight row a fragment row
// holds.
//
// Both kernels put the weights on the mma's 16 rows and the tokens on its 8 columns, so few tokens waste little. In
// fc1, fragment row g (0..7) is gate g and row g + 8 is up g of the same inner column: a thread's accumulators c0, c1
// (gate of tokens 2t, 2t+1) and c2, c3 (up) are then all it needs for silu(gate) * up, and 16 fragment rows are 16
// neighbouring rows of the weights.
#pragma once

#include "moe_args.h"
#include "mxc/warp.cuh"

namespace mxc {

// One of the two matrix products.
struct ExpertGemmArgs {
    const void* weights = nullptr;       // [L, M, K]
    const void* scales = nullptr;        // [L, M], int8 weights only
    const uint16_t* input = nullptr;     // rows of K
    const int32_t* row_token = nullptr;  // fc1: the input row of each sorted row; fc2: null, the row itself
    const int32_t* offsets = nullptr;    // [L + 1]
    void* out = nullptr;                 // fc1: Element [R, M / 2]; fc2: float [R, M]
    int32_t m = 0;
    int32_t k = 0;
    int32_t experts = 0;  // L
    int32_t scale_dtype = 0;
};

struct ExpertTile {
    int expert;
    int first_row;   // of the expert
    int rows;        // of the expert
    int first_tile;  // token tiles of all experts before this one
    int tiles;
};

// The expert that token tile `wanted` belongs to, experts having ceil(rows / tile_rows) of them. By a whole warp; all
// lanes get the answer. False past the last tile.
MXC_DEVICE bool findExpert(const int32_t* offsets, int experts, int tile_rows, int wanted, ExpertTile& found) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int before = 0;
    for (int base = 0; base < experts; base += 32) {
        const int expert = base + lane;
        int first = 0, rows = 0;
        if (expert < experts) {
            first = offsets[expert];
            rows = offsets[expert + 1] - first;
        }
        const int tiles = (rows + tile_rows - 1) / tile_rows;
        int sum = tiles;
        for (int delta = 1; delta < 32; delta *= 2) {
            const int below = shuffleUp(sum, delta);
            if (lane >= delta) sum += below;
        }
        const uint32_t reached = ballot(before + sum > wanted);
        if (reached != 0) {
            const int source = lowestBit(reached);
            found.expert = base + source;
            found.first_row = shuffle(first, source);
            found.rows = shuffle(rows, source);
            found.first_tile = before + shuffle(sum - tiles, source);
            found.tiles = shuffle(tiles, source);
            return true;
        }
        before += shuffle(sum, 31);
    }
    return false;
}

// Weight row (of a block of 16) that fragment row f holds.
template <bool kGated>
MXC_DEVICE constexpr int weightRow(int f) {
    return kGated ? (f < 8 ? 2 * f : 2 * (f - 8) + 1) : f;
}

MXC_DEVICE float swiglu(float gate, float up) { return gate / (1.0f + exponential(-gate)) * up; }

template <class Element>
MXC_DEVICE float loadScale(const ExpertGemmArgs& args, int64_t index) {
    if (args.scale_dtype == static_cast<int32_t>(DType::kFloat32)) return static_cast<const float*>(args.scales)[index];
    return unpackLow<Element>(static_cast<const uint16_t*>(args.scales)[index]);
}

template <class Element>
MXC_DEVICE uint16_t roundTo(float value) {
    return static_cast<uint16_t>(pack<Element>(value, 0.0f) & 0xffffu);
}

}  // namespace mxc
