// The tile work of the sm_90a prefill, one function per step of a chunk: products of one warpgroup on swizzled tiles
// of 64 tokens x 64 columns, and what stands between them. Tiles are named by their shared addresses.
#pragma once

#include "mxc/hopper.cuh"
#include "prefill_common.cuh"

namespace mxc {

template <class Element>
struct Sm90Tiles {
    static constexpr int kDim = 128;
    static constexpr int kChunk = kLightningChunk;
    static constexpr uint32_t kBytes = kChunk * kSwizzleRowBytes;
    static constexpr uint32_t kTokens16 = 2 * kSwizzleAtomBytes;  // 16 tokens further down a tile
    using Product = Wgmma<Element, 64>;

    // Operand columns 16 kt.. of two tiles side by side.
    static MXC_DEVICE uint64_t along(uint64_t descriptor, int kt) {
        return advanced(descriptor, static_cast<uint32_t>(kt / 4) * kBytes + static_cast<uint32_t>(kt % 4) * 32);
    }

    // Starts P = Q K^T.
    static MXC_DEVICE void issueScores(float (&p)[8][4], uint32_t q, uint32_t k) {
        const uint64_t a = swizzledDescriptor(q), b = swizzledDescriptor(k);
        wgmmaFence();
        Product::template fromShared<0, 0, false>(p, a, b);
#pragma unroll
        for (int kt = 1; kt < kDim / 16; ++kt) Product::template fromShared<0, 0, true>(p, along(a, kt), along(b, kt));
        wgmmaCommit();
    }

    // Starts O^T = S^T Q^T, S^T rounded to 16 bits.
    static MXC_DEVICE void issueReadOut(float (&o)[8][4], const float (&state)[kDim / 8][4], uint32_t q) {
        uint32_t a[kDim / 16][4];
#pragma unroll
        for (int kt = 0; kt < kDim / 16; ++kt) {
            a[kt][0] = pack<Element>(state[2 * kt][0], state[2 * kt][1]);
            a[kt][1] = pack<Element>(state[2 * kt][2], state[2 * kt][3]);
            a[kt][2] = pack<Element>(state[2 * kt + 1][0], state[2 * kt + 1][1]);
            a[kt][3] = pack<Element>(state[2 * kt + 1][2], state[2 * kt + 1][3]);
        }
        const uint64_t b = swizzledDescriptor(q);
        wgmmaFence();
        Product::template fromRegisters<0, false>(o, a[0], b);
#pragma unroll
        for (int kt = 1; kt < kDim / 16; ++kt) Product::template fromRegisters<0, true>(o, a[kt], along(b, kt));
        wgmmaCommit();
    }

    // Starts O^T += V^T P^T.
    static MXC_DEVICE void issueValues(float (&o)[8][4], uint32_t v, uint32_t score) {
        const uint64_t a = swizzledDescriptor(v), b = swizzledDescriptor(score);
        wgmmaFence();
#pragma unroll
        for (int jt = 0; jt < kChunk / 16; ++jt) {
            const auto step = static_cast<uint32_t>(jt);
            Product::template fromShared<1, 0, true>(o, advanced(a, step * kTokens16), advanced(b, step * 32));
        }
        wgmmaCommit();
    }

    // Starts added = (V * to_end)^T K, the small part of the decayed values first.
    static MXC_DEVICE void issueUpdate(float (&added)[kDim / 8][4], uint32_t high, uint32_t low, uint32_t k) {
        using Wide = Wgmma<Element, kDim>;
        const uint64_t a = swizzledDescriptor(low), b = swizzledDescriptor(k, kBytes), c = swizzledDescriptor(high);
        wgmmaFence();
        Wide::template fromShared<1, 1, false>(added, a, b);
#pragma unroll
        for (int jt = 1; jt < kChunk / 16; ++jt) {
            const uint32_t down = static_cast<uint32_t>(jt) * kTokens16;
            Wide::template fromShared<1, 1, true>(added, advanced(a, down), advanced(b, down));
        }
#pragma unroll
        for (int jt = 0; jt < kChunk / 16; ++jt) {
            const uint32_t down = static_cast<uint32_t>(jt) * kTokens16;
            Wide::template fromShared<1, 1, true>(added, advanced(c, down), advanced(b, down));
        }
        wgmmaCommit();
    }

    // What one slope makes of this lane's elements of P in every chunk: rows i0, i0 + 8, columns j0 + 8 nt, + 1.
    static MXC_DEVICE void scoreFactors(float (&factor)[8][4], float slope, float scale, int i0, int j0) {
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int apart = i0 + 8 * (r / 2) - (j0 + 8 * nt + r % 2);
                factor[nt][r] = scale * expf(-slope * static_cast<float>(apart > 0 ? apart : 0));
            }
        }
    }

    // P * scale * decay below the diagonal, zeros above: selected rather than multiplied by 0, for an overflowed
    // product above the diagonal must not become NaN.
    template <bool kPerToken>
    static MXC_DEVICE void decayScores(float (&p)[8][4], const float (&factor)[8][4], const ChunkDecay& decay,
                                       float scale, int i0, int j0) {
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int i = i0 + 8 * (r / 2), j = j0 + 8 * nt + r % 2;
                float kept = factor[nt][r];
                if constexpr (kPerToken) kept = scale * expf(fminf(decay.cumulative[i] - decay.cumulative[j], 0.0f));
                p[nt][r] = j <= i ? p[nt][r] * kept : 0.0f;
            }
        }
    }

    // A warp's 16 rows of P into the tile [i][j].
    static MXC_DEVICE void storeScores(const float (&p)[8][4], uint32_t tile, int warp, int lane) {
        const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int nt = 0; nt < 8; nt += 2) {
            storeMatrix4(tile + swizzledOffset(row, nt + lane / 16), pack<Element>(p[nt][0], p[nt][1]),
                         pack<Element>(p[nt][2], p[nt][3]), pack<Element>(p[nt + 1][0], p[nt + 1][1]),
                         pack<Element>(p[nt + 1][2], p[nt + 1][3]));
        }
    }

    // V * to_end of `kTiles` tiles as the sum of two: rounded, and the rounded rest. 128 threads.
    template <int kTiles>
    static MXC_DEVICE void splitValues(uint32_t v, uint32_t high, uint32_t low, const ChunkDecay& decay, int thread) {
        const uint32_t at = swizzledOffset(thread / 8, thread % 8);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const float kept = decay.to_end[thread / 8 + 16 * step];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint32_t here =
                    at + static_cast<uint32_t>(step) * kTokens16 + static_cast<uint32_t>(tile) * kBytes;
                const uint4 values = loadShared128(v + here);
                uint4 first, rest;
                splitProduct<Element>(values.x, kept, kept, first.x, rest.x);
                splitProduct<Element>(values.y, kept, kept, first.y, rest.y);
                splitProduct<Element>(values.z, kept, kept, first.z, rest.z);
                splitProduct<Element>(values.w, kept, kept, first.w, rest.w);
                storeShared128(high + here, first);
                storeShared128(low + here, rest);
            }
        }
    }

    // O of the tokens past the length is zero, whatever NaN or infinity their chunk has.
    static MXC_DEVICE void clearPastLength(float (&o)[8][4], int valid, int lane) {
        if (valid >= kChunk) return;
#pragma unroll
        for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if (nt * 8 + lane % 4 * 2 + r % 2 >= valid) o[nt][r] = 0.0f;
            }
        }
    }

    // A warp's 16 value columns of O into the tile [token][value].
    static MXC_DEVICE void storeOutput(const float (&o)[8][4], uint32_t tile, int warp, int lane) {
#pragma unroll
        for (int nt = 0; nt < 8; nt += 2) {
            const int token = (nt + lane / 16) * 8 + lane % 8;
            storeMatrix4Transposed(tile + swizzledOffset(token, warp * 2 + lane / 8 % 2),
                                   pack<Element>(o[nt][0], o[nt][1]), pack<Element>(o[nt][2], o[nt][3]),
                                   pack<Element>(o[nt + 1][0], o[nt + 1][1]),
                                   pack<Element>(o[nt + 1][2], o[nt + 1][3]));
        }
    }
};

}  // namespace mxc
