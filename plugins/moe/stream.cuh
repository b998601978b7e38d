// Few rows per expert: out = W x for a handful of tokens, at the speed of reading W.
//
// A block owns 16 weight rows of one expert with at least one token; its 8 warps share the columns in turn, 64 at a
// time. Weights go from global memory to the mma's A registers 16 bytes at a time, without shared memory. That works
// because a dot product does not care about the order of its terms: lane t of a quad holds 8 (bf16) or 16 (int8)
// neighbouring columns, and the tokens are read with the same order. The next 64 columns (int8: 128) are fetched before
// the current ones are used. The warps' sums meet in shared memory and are added in a fixed order.
//
// Rows beyond kMaxRows of one expert are done in further passes over the weights: right, but slow; planMoe avoids it.
#pragma once

#include "expert_tile.cuh"

namespace mxc {

// Grid: min(L, R) * ceil(M / 16). kGated: fc1 with SwiGLU, else fc2. kMaxRows: 8 or 32.
template <class Element, bool kInt8, bool kGated, int kMaxRows>
struct MoeStream {
    using Args = ExpertGemmArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = kMaxRows == 8 ? 3 : 2;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kColumns = 64;  // of one step of a warp
    static constexpr int kTiles = kMaxRows / 8;
    static constexpr int kSharedBytes = kWarps * kTiles * 4 * 32 * 4;
    static constexpr int kLoads = kInt8 ? 1 : 2;  // 16-byte loads per weight row and step
    static constexpr int kWeightBytes = kInt8 ? 1 : 2;
    static constexpr int kDepth = kInt8 ? 2 : 1;  // steps fetched ahead: 64 bytes per thread

    // Column, within a step, of the 8 that a lane feeds to mma pair `piece`.
    static MXC_DEVICE int columnOf(int piece, int t) { return kInt8 ? 16 * t + 8 * piece : 32 * piece + 8 * t; }

    struct Weights {
        uint4 row[2][kLoads];  // fragment rows g and g + 8
    };

    struct Position {
        const char* row[2];
        int g, t, warp;
        int columns;
    };

    static MXC_DEVICE void fetch(const Position& at, int column0, Weights& weights) {
#pragma unroll
        for (int load = 0; load < kLoads; ++load) {
            const int column = column0 + (kInt8 ? 16 * at.t : columnOf(load, at.t));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                weights.row[half][load] =
                    column < at.columns ? loadStreamed16(at.row[half] + static_cast<int64_t>(column) * kWeightBytes)
                                        : make_uint4(0u, 0u, 0u, 0u);
            }
        }
    }

    static MXC_DEVICE uint32_t word(const uint4& from, int i) {
        return i == 0 ? from.x : (i == 1 ? from.y : (i == 2 ? from.z : from.w));
    }

    // A of the mma over columns 4 * (2 * piece + part) .. of each lane's.
    static MXC_DEVICE void fragment(const Weights& weights, int piece, int part, uint32_t (&a)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kInt8) {
                const uint32_t four = word(weights.row[half][0], 2 * piece + part);
                a[half] = int8Pair<Element>(four, 0);
                a[2 + half] = int8Pair<Element>(four, 1);
            } else {
                a[half] = word(weights.row[half][piece % kLoads], 2 * part);
                a[2 + half] = word(weights.row[half][piece % kLoads], 2 * part + 1);
            }
        }
    }

    // All columns of this warp for token tiles 0..kCount-1; `tokens` are the rows of this lane's token in each tile, or
    // null.
    template <int kCount>
    static MXC_DEVICE void multiply(const Position& at, const uint16_t* const (&tokens)[kTiles],
                                    float (&sum)[kTiles][4]) {
        constexpr int kStride = kWarps * kColumns;
        Weights ahead[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) fetch(at, at.warp * kColumns + i * kStride, ahead[i]);
        for (int column0 = at.warp * kColumns; column0 < at.columns; column0 += kStride) {
            const Weights weights = ahead[0];
#pragma unroll
            for (int i = 1; i < kDepth; ++i) ahead[i - 1] = ahead[i];
            fetch(at, column0 + kDepth * kStride, ahead[kDepth - 1]);
#pragma unroll
            for (int piece = 0; piece < 2; ++piece) {
                const int column = column0 + columnOf(piece, at.t);
                uint4 x[kCount];
#pragma unroll
                for (int tile = 0; tile < kCount; ++tile) {
                    x[tile] = tokens[tile] != nullptr && column < at.columns ? loadCached16(tokens[tile] + column)
                                                                             : make_uint4(0u, 0u, 0u, 0u);
                }
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    uint32_t a[4];
                    fragment(weights, piece, part, a);
#pragma unroll
                    for (int tile = 0; tile < kCount; ++tile) {
                        mma16816<Element>(sum[tile], a, word(x[tile], 2 * part), word(x[tile], 2 * part + 1));
                    }
                }
            }
        }
    }

    static MXC_DEVICE void run(const Args& args, char* memory) {
        float* partial = reinterpret_cast<float*>(memory);  // [kWarps][kTiles * 4][32]
        const int blocks_m = (args.m + 15) / 16;
        ExpertTile found;
        // Every warp looks for itself: cheaper than a barrier. Experts with rows have one tile each.
        if (!findExpert(args.offsets, args.experts, 0x3fffffff, static_cast<int>(blockIdx.x) / blocks_m, found)) return;

        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int m0 = static_cast<int>(blockIdx.x) % blocks_m * 16;
        Position at;
        at.g = lane / 4;
        at.t = lane % 4;
        at.warp = static_cast<int>(threadIdx.x) / 32;
        at.columns = args.k;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = m0 + weightRow<kGated>(at.g + 8 * half);
            if (row >= args.m) row = args.m - 1;  // read, never stored
            at.row[half] = static_cast<const char*>(args.weights) +
                           (static_cast<int64_t>(found.expert) * args.m + row) * args.k * kWeightBytes;
        }

        for (int done = 0; done < found.rows; done += kMaxRows) {
            const int rows = found.rows - done < kMaxRows ? found.rows - done : kMaxRows;
            const uint16_t* tokens[kTiles];
            float sum[kTiles][4];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const int row = tile * 8 + at.g;
                tokens[tile] = nullptr;
                if (row < rows) {
                    const int sorted = found.first_row + done + row;
                    tokens[tile] = args.input + static_cast<int64_t>(kGated ? args.row_token[sorted] : sorted) * args.k;
                }
                sum[tile][0] = sum[tile][1] = sum[tile][2] = sum[tile][3] = 0.0f;
            }
            if constexpr (kTiles == 1) {
                multiply<1>(at, tokens, sum);
            } else {
                if (rows <= 8) {
                    multiply<1>(at, tokens, sum);
                } else if (rows <= 16) {
                    multiply<2>(at, tokens, sum);
                } else {
                    multiply<kTiles>(at, tokens, sum);
                }
            }
            if (done > 0) syncBlock();  // the sums of the pass before have been read
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) partial[(at.warp * kTiles * 4 + tile * 4 + i) * 32 + lane] = sum[tile][i];
            }
            syncBlock();
            store(args, found, m0, done, rows, partial);
        }
    }

  private:
    // One thread per pair of fragment rows g, g + 8 and token.
    static MXC_DEVICE void store(const Args& args, const ExpertTile& found, int m0, int done, int rows,
                                 const float* partial) {
        const int unit = static_cast<int>(threadIdx.x);
        if (unit >= kTiles * 2 * 32) return;
        const int lane = unit % 32, tile = unit / 64, odd = unit / 32 % 2;
        const int g = lane / 4, token = tile * 8 + lane % 4 * 2 + odd;
        if (token >= rows) return;
        float value[2] = {0.0f, 0.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            for (int warp = 0; warp < kWarps; ++warp) {
                value[half] += partial[(warp * kTiles * 4 + tile * 4 + 2 * half + odd) * 32 + lane];
            }
            const int row = m0 + weightRow<kGated>(g + 8 * half);
            if constexpr (kInt8) {
                if (row < args.m)
                    value[half] *= loadScale<Element>(args, static_cast<int64_t>(found.expert) * args.m + row);
            }
        }
        const int64_t sorted = found.first_row + done + token;
        if constexpr (kGated) {
            const int column = m0 / 2 + g;
            if (column < args.m / 2) {
                static_cast<uint16_t*>(args.out)[sorted * (args.m / 2) + column] =
                    roundTo<Element>(swiglu(value[0], value[1]));
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m0 + g + 8 * half;
                if (row < args.m) static_cast<float*>(args.out)[sorted * args.m + row] = value[half];
            }
        }
    }
};

}  // namespace mxc
