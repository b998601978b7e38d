// What the prefill kernels share: which piece of the work a CTA has, and the fragments of state and output.
#pragma once

#include "chunk_decay.cuh"
#include "mxc/device.cuh"
#include "prefill_args.h"

namespace mxc {

// The piece of one CTA: blockIdx.x counts value splits fastest, then segments, heads, sequences.
struct PrefillPiece {
    int split, segment, head, batch;
    int slot;
    bool used;               // the slot names a state; else nothing is computed and the outputs are zeros
    int64_t first_token;     // of the segment
    int end_token;           // the segment's end, cut at T
    int valid;               // tokens of the segment that are within the length
    int chunks;              // that hold valid tokens
    int64_t row_stride;      // elements between tokens of one head
    int64_t first_row;       // row of the segment's first token in [B, T, H, .]
    int64_t state_index;     // of this piece's state among [B, H, segments]
    const float* log_decay;  // of the first token, stride `heads`; null: slope
    float slope;

    MXC_DEVICE PrefillPiece(const PrefillArgs& args, int dim, int splits, int segments) {
        int index = static_cast<int>(blockIdx.x);
        split = index % splits;
        index /= splits;
        segment = index % segments;
        index /= segments;
        head = index % args.heads;
        batch = index / args.heads;
        slot = args.slots != nullptr ? args.slots[batch] : batch;
        used = slot >= 0 && slot < args.slot_count;
        int length = args.lengths != nullptr ? args.lengths[batch] : args.tokens;
        length = !used || length < 0 ? 0 : (length > args.tokens ? args.tokens : length);

        first_token = static_cast<int64_t>(segment) * args.segment_chunks * kLightningChunk;
        const int64_t end_wanted = first_token + static_cast<int64_t>(args.segment_chunks) * kLightningChunk;
        end_token = end_wanted < args.tokens ? static_cast<int>(end_wanted) : args.tokens;
        valid = (length < end_token ? length : end_token) - static_cast<int>(first_token);
        if (valid < 0) valid = 0;
        chunks = (valid + kLightningChunk - 1) / kLightningChunk;

        row_stride = static_cast<int64_t>(args.heads) * dim;
        first_row = (static_cast<int64_t>(batch) * args.tokens + first_token) * args.heads + head;
        state_index = (static_cast<int64_t>(batch) * args.heads + head) * args.segments + segment;
        log_decay = args.log_decay != nullptr ? args.log_decay + first_row : nullptr;
        slope = log_decay != nullptr ? 0.0f : -boundLogDecay(-args.slopes[head]);
    }

    MXC_DEVICE bool perToken() const { return log_decay != nullptr; }
    // Valid tokens of chunk `chunk` (0..chunks-1), at least 1.
    MXC_DEVICE int validOf(int chunk) const {
        const int rest = valid - chunk * kLightningChunk;
        return rest < kLightningChunk ? rest : kLightningChunk;
    }
    // Where the walk starts from: the scan's result, the caller's state, or null: zeros.
    MXC_DEVICE const float* initialState(const PrefillArgs& args, int state_size) const {
        if (args.segments > 1) return args.segment_states + state_index * state_size;
        if (!used || args.state_in == nullptr) return nullptr;
        return args.state_in + (static_cast<int64_t>(slot) * args.heads + head) * state_size;
    }
    // Where its result goes: only the last segment has one. Null: nowhere.
    MXC_DEVICE float* finalState(const PrefillArgs& args, int state_size) const {
        if (segment != args.segments - 1 || !used) return nullptr;
        return args.state_out + (static_cast<int64_t>(slot) * args.heads + head) * state_size;
    }
};

// A transposed state S^T as a warp holds it: 16 value columns, all kDim keys.
//   fragment[nt][r] = S[key][value], key = 8 nt + 2 (lane % 4) + r % 2, value = value0 + lane / 4 + 8 (r / 2)
template <int kDim>
MXC_DEVICE void loadState(float (&fragment)[kDim / 8][4], const float* from, int value0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int offset = lane % 4 * 2 * kDim + value0 + lane / 4;
#pragma unroll
    for (int nt = 0; nt < kDim / 8; ++nt) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            fragment[nt][r] = from != nullptr ? from[offset + (nt * 8 + r % 2) * kDim + 8 * (r / 2)] : 0.0f;
        }
    }
}

template <int kDim>
MXC_DEVICE void storeState(const float (&fragment)[kDim / 8][4], float* to, int value0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int offset = lane % 4 * 2 * kDim + value0 + lane / 4;
#pragma unroll
    for (int nt = 0; nt < kDim / 8; ++nt) {
#pragma unroll
        for (int r = 0; r < 4; ++r) to[offset + (nt * 8 + r % 2) * kDim + 8 * (r / 2)] = fragment[nt][r];
    }
}

// Stores O^T of one chunk: o[nt][r] = O[token][value], value = lane / 4 + 8 (r / 2), token = 8 nt + 2 (lane % 4) + r
// % 2. `out` is at the warp's first value. Rows (tokens) below `valid` get their values, rows from there to `rows`
// zeros.
template <class Element>
MXC_DEVICE void storeOutput(const float (&o)[kLightningChunk / 8][4], uint16_t* out, int64_t row_stride, int valid,
                            int rows) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool odd = lane % 2 != 0;
    // After the exchange an even lane holds values 2t..2t+3 of the lower 8, an odd one 2t-2..2t+1 of the upper 8: 8
    // bytes each, and the four lanes of a token 32 contiguous bytes.
    uint16_t* to = out + lane / 4 * row_stride + (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
    for (int nt = 0; nt < kLightningChunk / 8; ++nt) {
        const int token = nt * 8 + lane / 4;
        const uint32_t lower = transposeMatrix(pack<Element>(o[nt][0], o[nt][1]));
        const uint32_t upper = transposeMatrix(pack<Element>(o[nt][2], o[nt][3]));
        const uint32_t other = shuffleXor(odd ? lower : upper, 1);
        const uint2 four = odd ? make_uint2(other, upper) : make_uint2(lower, other);
        if (token < rows) *reinterpret_cast<uint2*>(to) = token < valid ? four : make_uint2(0, 0);
        to += 8 * row_stride;
    }
}

// Zeros for the tokens of the segment that are in no computed chunk.
template <int kValues>
MXC_DEVICE void clearRest(uint16_t* out, const PrefillPiece& piece, int thread, int threads) {
    constexpr int kVectors = kValues / 8;
    const int64_t done = static_cast<int64_t>(piece.chunks) * kLightningChunk;
    const int64_t rest = static_cast<int64_t>(piece.end_token) - piece.first_token - done;
    uint16_t* rows = out + done * piece.row_stride;
    for (int64_t i = thread; i < rest * kVectors; i += threads) {
        *reinterpret_cast<uint4*>(rows + i / kVectors * piece.row_stride + i % kVectors * 8) = make_uint4(0, 0, 0, 0);
    }
}

// The pair of values times its tokens' decays as the sum of two 16-bit pairs: the rounded product and the rounded rest.
template <class Element>
MXC_DEVICE void splitProduct(uint32_t pair, float decay0, float decay1, uint32_t& high, uint32_t& low) {
    const float first = unpackLow<Element>(pair) * decay0, second = unpackHigh<Element>(pair) * decay1;
    high = pack<Element>(first, second);
    low = pack<Element>(first - unpackLow<Element>(high), second - unpackHigh<Element>(high));
}

}  // namespace mxc
