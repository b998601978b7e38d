// Grouped GEMM for any number of rows per expert, on mma.sync (sm_80 and later): tiles of 128 weight rows by kTokens
// tokens by 64 columns, a ring of asynchronous copies, SwiGLU on the accumulators of fc1.
//
// Token rows are gathered by their copies (fc1), so nothing is permuted in memory. int8 weights lie in shared memory as
// bytes and become 16-bit floats (exactly) on their way to the mma; their scales multiply the fp32 sums.
//
// Shared memory rows are 8 chunks of 16 bytes, chunk c of row r at place c ^ (r % 8): copies and ldmatrix touch all
// banks evenly. int8 rows of 64 bytes are padded to 80 for the same reason.
//
// Blocks are numbered expert by expert; in an expert, bands of kBand token tiles, in a band, weight tile by weight tile
// with the band's token tiles side by side: blocks that run together share weights and tokens in the L2.
#pragma once

#include "expert_tile.cuh"

namespace mxc {

// Grid: (R / kTokens + min(L, R)) * ceil(M / 128), the most there can be; blocks past the last tile end at once.
template <class Element, bool kInt8, bool kGated, int kTokens>
struct MoeGrouped {
    using Args = ExpertGemmArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = kTokens == 128 ? 1 : 2;  // registers for 128 x 128 sums and operands in flight
    static constexpr int kRows = 128;                          // weight rows
    static constexpr int kColumns = 64;
    static constexpr int kBand = 16;
    static constexpr int kStages = kTokens == 128 ? 3 : 4;
    static constexpr int kWarpsTokens = kTokens / 32;  // warps along the tokens, 32 tokens each
    static constexpr int kWarpRows = kRows / (8 / kWarpsTokens);
    static constexpr int kFragments = kWarpRows / 16;       // of weight rows per warp
    static constexpr int kWeightStride = kInt8 ? 80 : 128;  // bytes of a weight row in shared memory
    static constexpr int kWeightBytes = kInt8 ? 1 : 2;
    static constexpr int kStageBytes = kRows * kWeightStride + kTokens * 128;
    static constexpr int kOutWidth = kGated ? kRows / 2 : kRows;
    static constexpr int kOutStride =
        kGated ? (kOutWidth + 8) * 2 : (kOutWidth + 4) * 4;  // bytes of a token in the output tile
    static constexpr int kOutBytes = kTokens * kOutStride;
    static constexpr int kSharedBytes = kStages * kStageBytes > kOutBytes ? kStages * kStageBytes : kOutBytes;
    static_assert(kStageBytes % 128 == 0 && kRows * kWeightStride % 128 == 0, "see laneOffsets");
    static_assert(kSharedBytes <= 99 * 1024, "fits the smallest of the supported GPUs");

    static constexpr int kTokenCopies = kTokens * 8 / kThreads;             // per thread and stage
    static constexpr int kWeightChunks = kColumns * kWeightBytes / 16;      // per row
    static constexpr int kWeightCopies = kRows * kWeightChunks / kThreads;  // per thread and stage
    static constexpr int kWeightRowStep = kThreads / kWeightChunks;         // rows between a thread's copies
    static_assert(kWeightRowStep % 16 == 0, "a thread's copies share their place in a block of 16 rows");

    // Where this thread's copies come from.
    struct Sources {
        const char* weights;          // first of its weight rows; the others follow at kWeightRowStep rows
        int first_row;                // of the tile's
        int rows_left;                // weight rows from its first one to the end of the matrix
        int row_step;                 // bytes
        int input_row[kTokenCopies];  // -1 past the end
    };

    static MXC_DEVICE void copyStage(const Args& args, const Sources& from, uint32_t stage, int column0) {
        const int thread = static_cast<int>(threadIdx.x);
        {
            const int chunk = thread % kWeightChunks;
            const int column = column0 + chunk * (16 / kWeightBytes);
#pragma unroll
            for (int i = 0; i < kWeightCopies; ++i) {
                const int row = from.first_row + i * kWeightRowStep;
                const bool valid = column < args.k && i * kWeightRowStep < from.rows_left;
                const char* source = from.weights + (valid ? i * from.row_step + column * kWeightBytes : 0);
                copyAsync16(
                    stage + static_cast<uint32_t>(row * kWeightStride + (kInt8 ? chunk : chunk ^ (row % 8)) * 16),
                    source, valid);
            }
        }
        const uint32_t tokens = stage + kRows * kWeightStride;
        const int chunk = thread % 8;
        const int column = column0 + chunk * 8;
#pragma unroll
        for (int i = 0; i < kTokenCopies; ++i) {
            const int row = thread / 8 + i * (kThreads / 8);
            const bool valid = column < args.k && from.input_row[i] >= 0;
            const int64_t at = valid ? static_cast<int64_t>(from.input_row[i]) * args.k + column : 0;
            copyAsync16(tokens + static_cast<uint32_t>(row * 128 + (chunk ^ (row % 8)) * 16), args.input + at, valid);
        }
    }

    // Byte offsets in a stage of what this lane reads at the first 16 columns. Rows are 128 bytes, so 32 bytes further
    // is an exclusive or, and 16 rows further a constant: one register each.
    struct Lane {
        uint32_t weights;
        uint32_t tokens;
    };
    static MXC_DEVICE Lane laneOffsets(int warp_row0, int warp_token0) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        Lane out;
        out.weights =
            static_cast<uint32_t>(kInt8 ? (warp_row0 + lane / 4) * kWeightStride + lane % 4 * 2
                                        : (warp_row0 + lane % 16) * kWeightStride + (lane / 16 ^ lane % 8) * 16);
        out.tokens = static_cast<uint32_t>(kRows * kWeightStride + (warp_token0 + lane % 8 + lane / 16 * 8) * 128 +
                                           (lane / 8 % 2 ^ lane % 8) * 16);
        return out;
    }

    static MXC_DEVICE void weightFragment(uint32_t weights, int f, int step, uint32_t (&a)[4]) {
        if constexpr (kInt8) {
            const uint32_t at = weights + static_cast<uint32_t>(f * 16 * kWeightStride + step * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = int8Pair<Element>(
                    loadShared16(at + static_cast<uint32_t>(i % 2 * 8 * kWeightStride + i / 2 * 8)), 0);
            }
        } else {
            loadMatrix4(a,
                        (weights ^ static_cast<uint32_t>(step * 32)) + static_cast<uint32_t>(f * 16 * kWeightStride));
        }
    }

    static MXC_DEVICE void multiplyStage(uint32_t stage, const Lane& at, float (&sum)[kFragments][4][4]) {
        const uint32_t weights = stage + at.weights, tokens = stage + at.tokens;
#pragma unroll
        for (int step = 0; step < kColumns / 16; ++step) {
            uint32_t b[2][4];  // 16 tokens each
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                loadMatrix4(b[pair],
                            (tokens ^ static_cast<uint32_t>(step * 32)) + static_cast<uint32_t>(pair * 16 * 128));
            }
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
                uint32_t a[4];
                weightFragment(weights, f, step, a);
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    mma16816<Element>(sum[f][tile], a, b[tile / 2][tile % 2 * 2], b[tile / 2][tile % 2 * 2 + 1]);
                }
            }
        }
    }

    static MXC_DEVICE void run(const Args& args, char* memory) {
        const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
        const int blocks_m = (args.m + kRows - 1) / kRows;
        ExpertTile found;
        if (!findExpert(args.offsets, args.experts, kTokens, static_cast<int>(blockIdx.x) / blocks_m, found)) return;
        int index = static_cast<int>(blockIdx.x) - found.first_tile * blocks_m;
        const int band = index / (kBand * blocks_m);
        index -= band * kBand * blocks_m;
        const int band_tiles = found.tiles - band * kBand < kBand ? found.tiles - band * kBand : kBand;
        const int m0 = index / band_tiles * kRows;
        const int token0 = (band * kBand + index % band_tiles) * kTokens;
        const int token_count = found.rows - token0 < kTokens ? found.rows - token0 : kTokens;

        Sources from;
        {
            const int row = thread / kWeightChunks;
            const int weight = m0 + row / 16 * 16 + weightRow<kGated>(row % 16);
            from.first_row = row;
            from.rows_left = args.m - weight;
            from.row_step = kWeightRowStep * args.k * kWeightBytes;  // hidden and inner are at most 2^20
            from.weights =
                static_cast<const char*>(args.weights) +
                (static_cast<int64_t>(found.expert) * args.m + (weight < args.m ? weight : 0)) * args.k * kWeightBytes;
        }
#pragma unroll
        for (int i = 0; i < kTokenCopies; ++i) {
            const int row = thread / 8 + i * (kThreads / 8);
            from.input_row[i] = -1;
            if (row < token_count) {
                const int sorted = found.first_row + token0 + row;
                from.input_row[i] = kGated ? args.row_token[sorted] : sorted;
            }
        }

        const int warp_row0 = warp / kWarpsTokens * kWarpRows, warp_token0 = warp % kWarpsTokens * 32;
        float sum[kFragments][4][4];
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[f][tile][i] = 0.0f;
            }
        }

        const uint32_t stages =
            sharedAddress(memory);  // 1024-byte aligned; every stage and row of 128 bytes is 128-byte aligned
        const Lane at = laneOffsets(warp_row0, warp_token0);
        const int steps = (args.k + kColumns - 1) / kColumns;
#pragma unroll
        for (int stage = 0; stage < kStages - 1; ++stage) {
            if (stage < steps)
                copyStage(args, from, stages + static_cast<uint32_t>(stage * kStageBytes), stage * kColumns);
            copyAsyncCommit();
        }
        int read = 0, write = kStages - 1;
        for (int step = 0; step < steps; ++step) {
            copyAsyncWait<kStages - 2>();  // the copies of `step`
            syncBlock();                   // everybody's; and everybody has left the stage that is written next
            if (step + kStages - 1 < steps) {
                copyStage(args, from, stages + static_cast<uint32_t>(write * kStageBytes),
                          (step + kStages - 1) * kColumns);
            }
            copyAsyncCommit();
            multiplyStage(stages + static_cast<uint32_t>(read * kStageBytes), at, sum);
            read = read + 1 == kStages ? 0 : read + 1;
            write = write + 1 == kStages ? 0 : write + 1;
        }
        copyAsyncWait<0>();
        syncBlock();  // the stages become the output tile

        const int64_t matrix = static_cast<int64_t>(found.expert) * args.m;
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
            const int row0 = warp_row0 + f * 16;
            float scale[2] = {1.0f, 1.0f};
            if constexpr (kInt8) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = m0 + row0 + weightRow<kGated>(g + 8 * half);
                    if (row < args.m) scale[half] = loadScale<Element>(args, matrix + row);
                }
            }
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    char* token = memory + (warp_token0 + tile * 8 + 2 * t + odd) * kOutStride;
                    const float first = sum[f][tile][odd] * scale[0], second = sum[f][tile][2 + odd] * scale[1];
                    if constexpr (kGated) {
                        reinterpret_cast<uint16_t*>(token)[row0 / 2 + g] = roundTo<Element>(swiglu(first, second));
                    } else {
                        reinterpret_cast<float*>(token)[row0 + g] = first;
                        reinterpret_cast<float*>(token)[row0 + g + 8] = second;
                    }
                }
            }
        }
        syncBlock();

        constexpr int kOutElement = kGated ? 2 : 4;
        constexpr int kChunks = kOutWidth * kOutElement / 16;  // of one token
        const int width = kGated ? args.m / 2 : args.m, column0 = kGated ? m0 / 2 : m0;
        for (int i = thread; i < token_count * kChunks; i += kThreads) {
            const int token = i / kChunks, chunk = i % kChunks;
            const int column = column0 + chunk * (16 / kOutElement);
            if (column >= width) continue;
            char* to = static_cast<char*>(args.out) +
                       (static_cast<int64_t>(found.first_row + token0 + token) * width + column) * kOutElement;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(memory + token * kOutStride + chunk * 16);
        }
    }
};

}  // namespace mxc
