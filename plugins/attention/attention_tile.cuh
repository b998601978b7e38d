// One CTA: 16 rows (query heads of one key/value head, times tokens) against a range of keys, in blocks of 64.
//
// Each of the 4 warps takes 16 keys of a block for all rows and keeps its own running maximum, weight and sums in
// registers (fp32); they are joined in shared memory at the end, in a fixed order. Rows are numbered
// r = token * (H / G) + head within the group, so a decode step fills a tile with the heads that share their keys.
#pragma once

#include "mxc/device.cuh"
#include "mxc/warp.cuh"

namespace mxc {

struct AttentionArgs {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const void* past_lengths;
    const void* new_lengths;
    float* partial;  // [tiles, splits, 16, K] sums, then [tiles, splits, 2, 16] maxima and weights
    int64_t pieces;
    int32_t wide_lengths;
    int32_t tokens, heads, kv_heads, capacity;
    int32_t row_tiles, splits;
    float scale_log2;  // scale * log2(e): scores are kept in powers of two
};

constexpr float kNoScore = -1e30f;  // below any score; finite, so that differences are never NaN

template <class Element, int kDim>
struct AttentionTile {
    using Args = AttentionArgs;
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 2;
    static constexpr int kRows = 16;
    static constexpr int kKeys = 64;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kStride = (kDim + 8) * 2;  // bytes of a row in shared memory: ldmatrix meets no bank twice
    static constexpr int kVectors = kDim / 8;       // 16-byte pieces of a row
    static constexpr int kTileBytes = (kRows + 2 * kKeys) * kStride;
    static constexpr int kJoinBytes = kWarps * kRows * (kDim + 2) * 4;
    static constexpr int kSharedBytes = kTileBytes > kJoinBytes ? kTileBytes : kJoinBytes;

    static MXC_DEVICE int64_t length(const Args& args, const void* from, int batch) {
        return args.wide_lengths != 0 ? static_cast<const int64_t*>(from)[batch]
                                      : static_cast<int64_t>(static_cast<const int32_t*>(from)[batch]);
    }
    static MXC_DEVICE int clamp(int64_t value, int most) {
        return value < 0 ? 0 : (value > most ? most : static_cast<int>(value));
    }
    static MXC_DEVICE float quadMax(float value) {
        value = fmaxf(value, shuffleXor(value, 1));
        return fmaxf(value, shuffleXor(value, 2));
    }
    static MXC_DEVICE float quadSum(float value) {
        value += shuffleXor(value, 1);
        return value + shuffleXor(value, 2);
    }

    static MXC_DEVICE void run(const Args& args, char* memory) {
        const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
        const int piece = static_cast<int>(blockIdx.x);
        const int split = piece % args.splits, tile = piece / args.splits;
        const int row0 = tile % args.row_tiles * kRows, group = tile / args.row_tiles;  // batch * G + g
        const int batch = group / args.kv_heads, kv_head = group % args.kv_heads;
        const int share = args.heads / args.kv_heads;

        const int past = clamp(length(args, args.past_lengths, batch), args.capacity);
        const int room = args.capacity - past;
        const int fresh = clamp(length(args, args.new_lengths, batch), args.tokens < room ? args.tokens : room);
        const int first_token = row0 / share;
        int last_token = (row0 + kRows - 1) / share;
        if (last_token > fresh - 1) last_token = fresh - 1;
        const int keys = first_token < fresh ? past + last_token + 1 : 0;  // that any row of this tile sees
        const int blocks = (keys + kKeys - 1) / kKeys;
        const int each = (blocks + args.splits - 1) / args.splits;
        const int begin = split * each;
        const int end = begin + each < blocks ? begin + each : blocks;

        const uint32_t q_tile = sharedAddress(memory);
        const uint32_t k_tile = q_tile + kRows * kStride;
        const uint32_t v_tile = k_tile + kKeys * kStride;
        const auto* q = static_cast<const uint16_t*>(args.q);
        const int64_t cache = static_cast<int64_t>(group) * args.capacity * kDim;
        const uint16_t* k = static_cast<const uint16_t*>(args.k) + cache;
        const uint16_t* v = static_cast<const uint16_t*>(args.v) + cache;

        for (int i = thread; i < kRows * kVectors; i += kThreads) {
            const int row = row0 + i / kVectors, token = row / share;
            const bool valid = token < fresh;
            const int64_t head = static_cast<int64_t>(batch) * args.heads + kv_head * share + row % share;
            const int64_t from = valid ? (head * args.tokens + token) * kDim + i % kVectors * 8 : 0;
            copyAsync16(q_tile + static_cast<uint32_t>(i / kVectors * kStride + i % kVectors * 16), q + from, valid);
        }

        // This thread's two rows: lane / 4 and lane / 4 + 8. The last key each may see.
        int last_key[2];
        for (int half = 0; half < 2; ++half) {
            const int token = (row0 + lane / 4 + half * 8) / share;
            last_key[half] = token < fresh ? past + token : -1;
        }
        float most[2] = {kNoScore, kNoScore}, weight[2] = {0.0f, 0.0f};
        float sums[kDim / 8][4];
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;

        for (int block = begin; block < end; ++block) {
            for (int i = thread; i < kKeys * kVectors; i += kThreads) {
                const int row = i / kVectors, key = block * kKeys + row;
                const bool valid = key < keys;
                const int64_t from = valid ? static_cast<int64_t>(key) * kDim + i % kVectors * 8 : 0;
                const auto to = static_cast<uint32_t>(row * kStride + i % kVectors * 16);
                copyAsync16(k_tile + to, k + from, valid);
                copyAsync16(v_tile + to, v + from, valid);
            }
            copyAsyncCommit();
            copyAsyncWait<0>();
            syncBlock();
            step(q_tile, k_tile, v_tile, block * kKeys + warp * 16, warp, lane, args.scale_log2, last_key, most, weight,
                 sums);
            syncBlock();  // before the next block is copied over this one
        }
        copyAsyncCommit();  // a tile without keys has not waited for its queries yet
        copyAsyncWait<0>();
        syncBlock();
        join(args, memory, thread, warp, lane, tile, split, row0, batch, kv_head, share, most, weight, sums);
    }

    // 16 keys from `key0` on against the 16 rows.
    static MXC_DEVICE void step(uint32_t q_tile, uint32_t k_tile, uint32_t v_tile, int key0, int warp, int lane,
                                float scale_log2, const int (&last_key)[2], float (&most)[2], float (&weight)[2],
                                float (&sums)[kDim / 8][4]) {
        float scores[2][4] = {};
        const uint32_t q_row = q_tile + static_cast<uint32_t>((lane % 8 + lane / 8 % 2 * 8) * kStride + lane / 16 * 16);
        const uint32_t k_row =
            k_tile + static_cast<uint32_t>((warp * 16 + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 16);
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            uint32_t queries[4], keys[4];
            loadMatrix4(queries, q_row + static_cast<uint32_t>(i * 32));
            loadMatrix4(keys, k_row + static_cast<uint32_t>(i * 32));
            mma16816<Element>(scores[0], queries, keys[0], keys[1]);
            mma16816<Element>(scores[1], queries, keys[2], keys[3]);
        }
        float rescale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = most[half];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int key = key0 + n * 8 + lane % 4 * 2 + c;
                    float& score = scores[n][half * 2 + c];
                    score = key <= last_key[half] ? score * scale_log2 : kNoScore;
                    top = fmaxf(top, score);
                }
            }
            top = quadMax(top);
            rescale[half] = exp2f(most[half] - top);
            weight[half] *= rescale[half];
            most[half] = top;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int key = key0 + n * 8 + lane % 4 * 2 + c;
                    float& score = scores[n][half * 2 + c];
                    score = key <= last_key[half] ? exp2f(score - top) : 0.0f;
                    weight[half] += score;
                }
            }
        }
        const uint32_t p[4] = {pack<Element>(scores[0][0], scores[0][1]), pack<Element>(scores[0][2], scores[0][3]),
                               pack<Element>(scores[1][0], scores[1][1]), pack<Element>(scores[1][2], scores[1][3])};
        const uint32_t v_row =
            v_tile + static_cast<uint32_t>((warp * 16 + lane % 8 + lane / 8 % 2 * 8) * kStride + lane / 16 * 16);
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            uint32_t values[4];
            loadMatrix4Transposed(values, v_row + static_cast<uint32_t>(i * 32));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float (&sum)[4] = sums[2 * i + n];
                sum[0] *= rescale[0];
                sum[1] *= rescale[0];
                sum[2] *= rescale[1];
                sum[3] *= rescale[1];
                mma16816<Element>(sum, p, values[2 * n], values[2 * n + 1]);
            }
        }
    }

    // Joins the warps and writes the tile: the result, or a piece of it where the keys were split.
    static MXC_DEVICE void join(const Args& args, char* memory, int thread, int warp, int lane, int tile, int split,
                                int row0, int batch, int kv_head, int share, float (&most)[2], float (&weight)[2],
                                const float (&sums)[kDim / 8][4]) {
        auto* all = reinterpret_cast<float*>(memory);  // [warps][rows][K]
        float* maxima = all + kWarps * kRows * kDim;   // [warps][rows]
        float* weights = maxima + kWarps * kRows;      // [warps][rows]
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + half * 8;
            const float total = quadSum(weight[half]);
            if (lane % 4 == 0) {
                maxima[warp * kRows + row] = most[half];
                weights[warp * kRows + row] = total;
            }
#pragma unroll
            for (int i = 0; i < kDim / 8; ++i) {
                float* to = all + (warp * kRows + row) * kDim + i * 8 + lane % 4 * 2;
                to[0] = sums[i][half * 2];
                to[1] = sums[i][half * 2 + 1];
            }
        }
        syncBlock();
        for (int i = thread; i < kRows * kDim / 2; i += kThreads) {
            const int row = i / (kDim / 2), column = i % (kDim / 2) * 2;
            float top = maxima[row];
            for (int w = 1; w < kWarps; ++w) top = fmaxf(top, maxima[w * kRows + row]);
            float low = 0.0f, high = 0.0f, total = 0.0f;
            for (int w = 0; w < kWarps; ++w) {
                const float factor = exp2f(maxima[w * kRows + row] - top);
                const float* from = all + (w * kRows + row) * kDim + column;
                low += factor * from[0];
                high += factor * from[1];
                total += factor * weights[w * kRows + row];
            }
            if (args.splits > 1) {
                const int64_t piece = static_cast<int64_t>(tile) * args.splits + split;
                float* to = args.partial + (piece * kRows + row) * kDim + column;
                to[0] = low;
                to[1] = high;
                float* facts = args.partial + args.pieces * kRows * kDim + piece * 2 * kRows + row;
                if (column == 0) {
                    facts[0] = top;
                    facts[kRows] = total;
                }
            } else {
                store(args, row0 + row, batch, kv_head, share, column, low, high, total);
            }
        }
    }

    static MXC_DEVICE void store(const Args& args, int row, int batch, int kv_head, int share, int column, float low,
                                 float high, float total) {
        if (row >= args.tokens * share) return;
        const float factor = total > 0.0f ? 1.0f / total : 0.0f;  // a row past the new length weighs nothing
        const int64_t head = static_cast<int64_t>(batch) * args.heads + kv_head * share + row % share;
        auto* out = static_cast<uint32_t*>(args.out);
        out[((head * args.tokens + row / share) * kDim + column) / 2] = pack<Element>(low * factor, high * factor);
    }
};

// Adds the pieces of one tile, in order.
template <class Element, int kDim>
struct AttentionCombine {
    using Args = AttentionArgs;
    using Tile = AttentionTile<Element, kDim>;
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 4;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int tile = static_cast<int>(blockIdx.x);
        const int row0 = tile % args.row_tiles * Tile::kRows, group = tile / args.row_tiles;
        const int share = args.heads / args.kv_heads;
        const int64_t first = static_cast<int64_t>(tile) * args.splits;
        const float* facts = args.partial + args.pieces * Tile::kRows * kDim + first * 2 * Tile::kRows;
        for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kDim / 2; i += kThreads) {
            const int row = i / (kDim / 2), column = i % (kDim / 2) * 2;
            float top = kNoScore;
            for (int s = 0; s < args.splits; ++s) top = fmaxf(top, facts[s * 2 * Tile::kRows + row]);
            float low = 0.0f, high = 0.0f, total = 0.0f;
            for (int s = 0; s < args.splits; ++s) {
                const float factor = exp2f(facts[s * 2 * Tile::kRows + row] - top);
                const float* from = args.partial + ((first + s) * Tile::kRows + row) * kDim + column;
                low += factor * from[0];
                high += factor * from[1];
                total += factor * facts[(s * 2 + 1) * Tile::kRows + row];
            }
            Tile::store(args, row0 + row, group / args.kv_heads, group % args.kv_heads, share, column, low, high,
                        total);
        }
    }
};

}  // namespace mxc
