// Lightning attention prefill with mma.sync: sm_80 and later, head_dim 64 or 128, at most 99 KB of shared memory.
//
// One CTA walks the chunks (64 tokens) of one (sequence, head, value part, segment) in order:
//   P  = (Q K^T) * scale * decay, lower triangle           rounded to 16 bits, through shared memory
//   O^T = S^T Q^T * from_start + V^T P^T                    S^T rounded to 16 bits as an operand only
//   S^T = S^T * whole + (V * to_end)^T K
// The state is kept transposed in fp32 registers: warp w owns value columns 16w..16w+15, and the accumulator layout of
// S^T is the A operand's layout, so it never passes through shared memory. V * to_end enters as the sum of two 16-bit
// numbers (the rounded value and the rounded rest): one 16-bit factor would put an error of 1.7e-3 into a state that
// must be right to 2e-4. The chunk's contribution is summed apart and added to the state once per chunk, for the tensor
// cores' sums truncate.
#pragma once

#include "prefill_common.cuh"

namespace mxc {

// kSummary: only the state of each segment but the last, from zero, for the scan.
template <class Element, int kDim, int kSplits, bool kSummary>
struct PrefillPortable {
    using Args = PrefillArgs;
    static constexpr int kChunk = kLightningChunk;
    static constexpr int kValues = kDim / kSplits;  // value columns of this CTA
    static constexpr int kWarps = kValues / 16;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kMinBlocks = 1;
    static_assert(kWarps == 4 || kWarps == 8, "the score tile is cut for 4 or 8 warps");

    // Rows are padded by 16 bytes, so the 8 rows that ldmatrix reads at once lie in different banks.
    static constexpr int kKeyStride = kDim + 8;
    static constexpr int kValueStride = kValues + 8;
    static constexpr int kScoreStride = kChunk + 8;
    static constexpr int kKeyTile = kChunk * kKeyStride;      // elements
    static constexpr int kValueTile = kChunk * kValueStride;  // elements
    struct Shared {
        alignas(16) uint16_t k[2][kKeyTile];
        alignas(16) uint16_t v[2][kValueTile];
        alignas(16) uint16_t q[kSummary ? 8 : kKeyTile];
        alignas(16) uint16_t score[kSummary ? 8 : kChunk * kScoreStride];
        ChunkDecay decay[2];
        DecayTable table;
    };
    static constexpr int kSharedBytes = sizeof(Shared);
    static_assert(kSharedBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 give a CTA 99 KB");

    // Byte addresses of the tiles.
    struct Tiles {
        uint32_t k, v, q, score;
        static constexpr uint32_t kStageK = 2 * kKeyTile, kStageV = 2 * kValueTile;
    };
    // Where lane l's row starts in a group of four 8x8 tiles: tiles 0, 1 below each other and 2, 3 to the right of them
    // ...
    static MXC_DEVICE uint32_t laneDown(int stride) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        return static_cast<uint32_t>(2 * (lane % 16 * stride + lane / 16 * 8));
    }
    // ... or tiles 0, 1 side by side and 2, 3 below them.
    static MXC_DEVICE uint32_t laneAcross(int stride) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        return static_cast<uint32_t>(2 * ((lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8));
    }

    // Starts the copy of `columns` columns of the chunk's rows; rows past `valid` become zeros.
    template <int kColumns, int kStride>
    static MXC_DEVICE void fetchTile(uint32_t tile, const uint16_t* rows, int64_t row_stride, int valid) {
        constexpr int kVectors = kColumns / 8;
        constexpr int kRows = kThreads / kVectors;  // copied at once
        static_assert(kThreads % kVectors == 0 && kChunk % kRows == 0, "the tile divides evenly");
        const int first = static_cast<int>(threadIdx.x) / kVectors,
                  column = static_cast<int>(threadIdx.x) % kVectors * 8;
        const uint32_t to = tile + static_cast<uint32_t>(2 * (first * kStride + column));
        const uint16_t* from = rows + column + (first < valid ? first * row_stride : 0);
#pragma unroll
        for (int row = 0; row < kChunk; row += kRows) {
            copyAsync16(to + 2 * row * kStride, from, first + row < valid);
            if (first + row + kRows < valid)
                from += kRows * row_stride;  // an absent row is not read, but its address stays good
        }
    }

    // P into shared memory: this warp makes rows 16 (warp % 4).. of 32 columns, or with 4 warps of 2 x 32 columns in
    // turn.
    static MXC_DEVICE void scores(const Shared& shared, const Tiles& tiles, int stage, bool per_token, float scale) {
        constexpr int kColumns = 32;
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        const int row0 = warp % 4 * 16;
        const uint32_t q = tiles.q + laneDown(kKeyStride) + static_cast<uint32_t>(2 * row0 * kKeyStride);
#pragma unroll 1
        for (int column0 = warp / 4 * kColumns; column0 < kChunk; column0 += kWarps / 4 * kColumns) {
            const uint32_t k = tiles.k + static_cast<uint32_t>(stage) * Tiles::kStageK + laneAcross(kKeyStride) +
                               static_cast<uint32_t>(2 * column0 * kKeyStride);
            float p[kColumns / 8][4] = {};
            if (column0 <= row0 + 15) {  // else wholly above the diagonal
#pragma unroll 2
                for (int kt = 0; kt < kDim / 16; ++kt) {
                    uint32_t a[4];
                    loadMatrix4(a, q + 2 * kt * 16);
#pragma unroll
                    for (int nt = 0; nt < kColumns / 8; nt += 2) {
                        uint32_t b[4];
                        loadMatrix4(b, k + 2 * (nt * 8 * kKeyStride + kt * 16));
                        mma16816<Element>(p[nt], a, b[0], b[1]);
                        mma16816<Element>(p[nt + 1], a, b[2], b[3]);
                    }
                }
            }
            const uint32_t score =
                tiles.score + static_cast<uint32_t>(2 * ((row0 + lane / 4) * kScoreStride + column0 + lane % 4 * 2));
            if (per_token) {
                storeScores<true>(shared.decay[stage], shared.table, p, score, scale, row0 + lane / 4,
                                  column0 + lane % 4 * 2);
            } else {
                storeScores<false>(shared.decay[stage], shared.table, p, score, scale, row0 + lane / 4,
                                   column0 + lane % 4 * 2);
            }
        }
    }

    // This lane's part of P: rows i0, i0 + 8, columns j0, j0 + 1 of each 8.
    template <bool kPerToken, int kTiles>
    static MXC_DEVICE void storeScores(const ChunkDecay& decay, const DecayTable& table, const float (&p)[kTiles][4],
                                       uint32_t score, float scale, int i0, int j0) {
#pragma unroll
        for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = i0 + 8 * half, j = j0 + nt * 8;
                const float low = decayedScore<kPerToken>(decay, table, p[nt][2 * half], scale, i, j);
                const float high = decayedScore<kPerToken>(decay, table, p[nt][2 * half + 1], scale, i, j + 1);
                storeShared32(score + 2 * (half * 8 * kScoreStride + nt * 8), pack<Element>(low, high));
            }
        }
    }

    static MXC_DEVICE void run(const Args& args, char* memory) {
        Shared& shared = *reinterpret_cast<Shared*>(memory);
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

        Tiles tiles;
        tiles.k = sharedAddress(shared.k);
        tiles.v = sharedAddress(shared.v);
        tiles.q = sharedAddress(shared.q);
        tiles.score = sharedAddress(shared.score);

        const PrefillPiece piece(args, kDim, kSplits, kSummary ? args.segments - 1 : args.segments);
        const int value0 = piece.split * kValues;
        const int64_t row_stride = piece.row_stride;
        const uint16_t* q = args.q + piece.first_row * kDim;
        const uint16_t* k = args.k + piece.first_row * kDim;
        const uint16_t* v = args.v + piece.first_row * kDim + value0;
        uint16_t* out = args.out + piece.first_row * kDim + value0;
        const bool per_token = piece.perToken();

        // First chunk on its way, decay tables, initial state.
        DecayReader reader;
        if (piece.chunks > 0) {
            const int valid = piece.validOf(0);
            if (!kSummary) fetchTile<kDim, kKeyStride>(tiles.q, q, row_stride, valid);
            fetchTile<kDim, kKeyStride>(tiles.k, k, row_stride, valid);
            fetchTile<kValues, kValueStride>(tiles.v, v, row_stride, valid);
            if (warp == 0) {
                reader.fetch(piece.log_decay, args.heads, valid);
                reader.store(shared.decay[0], per_token, piece.slope, args.scale, valid);
            }
            if (!per_token) shared.table.fill(piece.slope, static_cast<int>(threadIdx.x), kThreads);
        }
        copyAsyncCommit();
        float state[kDim / 8][4];
        loadState<kDim>(state, kSummary ? nullptr : piece.initialState(args, kDim * kDim), value0 + warp * 16);

        float total_log = 0.0f;
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            const int stage = chunk % 2;
            const int token0 = chunk * kChunk;
            const bool more = chunk + 1 < piece.chunks;
            const int next_valid = piece.validOf(chunk + 1);
            const int64_t next_rows = static_cast<int64_t>(token0 + kChunk) * row_stride;

            copyAsyncWait<0>();
            syncBlock();  // this chunk has landed for all; nobody reads the other stage any more
            if (more) {
                const uint32_t other = static_cast<uint32_t>(stage ^ 1);
                fetchTile<kDim, kKeyStride>(tiles.k + other * Tiles::kStageK, k + next_rows, row_stride, next_valid);
                fetchTile<kValues, kValueStride>(tiles.v + other * Tiles::kStageV, v + next_rows, row_stride,
                                                 next_valid);
                if (warp == 0 && per_token) {
                    reader.fetch(piece.log_decay + static_cast<int64_t>(token0 + kChunk) * args.heads, args.heads,
                                 next_valid);
                }
            }
            copyAsyncCommit();
            total_log += shared.decay[stage].whole_log;

            const uint32_t v_rows = tiles.v + static_cast<uint32_t>(stage) * Tiles::kStageV + laneAcross(kValueStride) +
                                    static_cast<uint32_t>(2 * 16 * warp);
            const uint32_t k_rows = tiles.k + static_cast<uint32_t>(stage) * Tiles::kStageK + laneDown(kKeyStride);
            if (!kSummary) {
                scores(shared, tiles, stage, per_token, args.scale);
                const uint32_t q_rows = tiles.q + laneAcross(kKeyStride),
                               score_rows = tiles.score + laneAcross(kScoreStride);

                float o[kChunk / 8][4] = {};  // O^T: value lane/4 (+8), tokens 8 nt + 2 (lane % 4), +1
#pragma unroll
                for (int kt = 0; kt < kDim / 16; ++kt) {
                    const uint32_t a[4] = {pack<Element>(state[2 * kt][0], state[2 * kt][1]),
                                           pack<Element>(state[2 * kt][2], state[2 * kt][3]),
                                           pack<Element>(state[2 * kt + 1][0], state[2 * kt + 1][1]),
                                           pack<Element>(state[2 * kt + 1][2], state[2 * kt + 1][3])};
#pragma unroll
                    for (int nt = 0; nt < kChunk / 8; nt += 2) {
                        uint32_t b[4];
                        loadMatrix4(b, q_rows + 2 * (nt * 8 * kKeyStride + kt * 16));
                        mma16816<Element>(o[nt], a, b[0], b[1]);
                        mma16816<Element>(o[nt + 1], a, b[2], b[3]);
                    }
                }
#pragma unroll
                for (int nt = 0; nt < kChunk / 8; ++nt) {
                    const float low = shared.decay[stage].from_start[nt * 8 + lane % 4 * 2];
                    const float high = shared.decay[stage].from_start[nt * 8 + lane % 4 * 2 + 1];
                    o[nt][0] *= low;
                    o[nt][1] *= high;
                    o[nt][2] *= low;
                    o[nt][3] *= high;
                }
                syncBlock();  // the scores are there; nobody reads q any more
                if (more) fetchTile<kDim, kKeyStride>(tiles.q, q + next_rows, row_stride, next_valid);
                copyAsyncCommit();

#pragma unroll
                for (int jt = 0; jt < kChunk / 16; ++jt) {
                    uint32_t values[4];  // V^T: rows 16 warp.., 16 tokens
                    loadMatrix4Transposed(values, v_rows + 2 * jt * 16 * kValueStride);
#pragma unroll
                    for (int nt = jt * 2; nt < kChunk / 8; nt += 2) {  // tokens before 16 jt see none of these
                        uint32_t b[4];
                        loadMatrix4(b, score_rows + 2 * (nt * 8 * kScoreStride + jt * 16));
                        mma16816<Element>(o[nt], values, b[0], b[1]);
                        mma16816<Element>(o[nt + 1], values, b[2], b[3]);
                    }
                }
                storeOutput<Element>(o, out + static_cast<int64_t>(token0) * row_stride + warp * 16, row_stride,
                                     piece.valid - token0,
                                     piece.end_token - static_cast<int>(piece.first_token) - token0);
            }
            updateState(state, shared.decay[stage], k_rows, v_rows);
            // Only now is the log-decay fetched above needed.
            if (more && warp == 0)
                reader.store(shared.decay[stage ^ 1], per_token, piece.slope, args.scale, next_valid);
        }
        copyAsyncWait<0>();

        if (kSummary) {
            storeState<kDim>(state, args.segment_states + piece.state_index * (kDim * kDim), value0 + warp * 16);
            if (piece.split == 0 && threadIdx.x == 0) args.segment_decays[piece.state_index] = expf(total_log);
            return;
        }
        float* final_state = piece.finalState(args, kDim * kDim);
        if (final_state != nullptr) storeState<kDim>(state, final_state, value0 + warp * 16);
        clearRest<kValues>(out, piece, static_cast<int>(threadIdx.x), kThreads);
    }

  private:
    // v_rows: transposed, tiles (tokens 0-7, values 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15) are the A operand of
    // V^T.
    static MXC_DEVICE void updateState(float (&state)[kDim / 8][4], const ChunkDecay& decay, uint32_t k_rows,
                                       uint32_t v_rows) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        // Half of the chunk's tokens at a time, in a loop that stays one: fewer registers beside the state. (A quarter
        // on sm_120, where the half spills.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
        constexpr int kTiles = 1;
#else
        constexpr int kTiles = 2;
#endif
        float kept = decay.whole;
#pragma unroll 1
        for (int token0 = 0; token0 < kChunk; token0 += kTiles * 16) {
            uint32_t high[kTiles][4], low[kTiles][4];
#pragma unroll
            for (int jt = 0; jt < kTiles; ++jt) {
                uint32_t values[4];
                loadMatrix4Transposed(values, v_rows + 2 * (token0 + jt * 16) * kValueStride);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int token = token0 + jt * 16 + r / 2 * 8 + lane % 4 * 2;
                    splitProduct<Element>(values[r], decay.to_end[token], decay.to_end[token + 1], high[jt][r],
                                          low[jt][r]);
                }
            }
            const uint32_t k_row = k_rows + 2 * token0 * kKeyStride;
#pragma unroll
            for (int nt = 0; nt < kDim / 8; nt += 2) {
                float added[2][4] = {};
#pragma unroll
                for (int jt = 0; jt < kTiles; ++jt) {
                    uint32_t b[4];
                    loadMatrix4Transposed(b, k_row + 2 * (jt * 16 * kKeyStride + nt * 8));
                    mma16816<Element>(added[0], low[jt], b[0], b[1]);
                    mma16816<Element>(added[1], low[jt], b[2], b[3]);
                    mma16816<Element>(added[0], high[jt], b[0], b[1]);
                    mma16816<Element>(added[1], high[jt], b[2], b[3]);
                }
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    state[nt][r] = state[nt][r] * kept + added[0][r];
                    state[nt + 1][r] = state[nt + 1][r] * kept + added[1][r];
                }
            }
            kept = 1.0f;
        }
    }
};

}  // namespace mxc
