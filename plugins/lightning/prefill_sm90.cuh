// Lightning attention prefill for sm_90a, head_dim 128: the algebra of prefill_portable.cuh on the copy engine and
// warpgroup products.
//
// One CTA per (sequence, head, value part, segment). Its warpgroups have one job each:
//   loading   one warp: boxes of Q, K and V by the copy engine into a ring of stages, and the chunk's decays. The two
//             value halves of a head form a cluster: each loads half of the tokens of Q and K for both (multicast).
//   scoring   P = decayed lower triangle of Q K^T, and V * to_end as the sum of two 16-bit tiles, one chunk or two
//   ahead state     (one per 64 value columns) the fp32 state S^T in registers:
//               O^T = S^T Q^T                        S^T from registers (rounded to 16 bits as an operand)
//               O^T = O^T * from_start + V^T P^T     leaves through V's place in the ring, by the copy engine
//               S^T = S^T * whole + (V * to_end)^T K the chunk's part summed apart
// All operands but S^T are read from shared memory. A chunk that its sequence does not fill is copied by ordinary
// loads of its valid tokens: tokens past a length must not be read (they may be NaN), which a box cannot express.
// Stores need no such care: outputs past a length are zeros, and the copy engine writes nothing past T.
#pragma once

#include <cstddef>

#include "mxc/tma.cuh"
#include "sm90_tiles.cuh"

namespace mxc {

struct PrefillSm90Args {
    PrefillArgs prefill;
    TensorMap q, k, v, out;  // of [B, T, H, 128], coordinates (column, head, token, sequence), boxes of 64 columns
};

// Which kernel of this file: the walk over all chunks with value halves apart or in clusters, or the segments' sums.
enum class Sm90Form { kApart, kCluster, kSummary };

template <class Element, int kSplits, Sm90Form kForm>
struct PrefillSm90 {
    using Args = PrefillSm90Args;
    using Tiles = Sm90Tiles<Element>;
    static constexpr bool kSummary = kForm == Sm90Form::kSummary;
    static constexpr int kCluster = kForm == Sm90Form::kCluster ? 2 : 1;
    static_assert(kCluster == 1 || kSplits == 2, "a cluster is the value halves of one head");
    static constexpr int kDim = 128;
    static constexpr int kChunk = kLightningChunk;
    static constexpr int kValues = kDim / kSplits;
    static constexpr int kGroups = kValues / 64;  // state warpgroups
    static constexpr int kThreads = (2 + kGroups) * 128;
    static constexpr int kMinBlocks = 1;

    // Registers of a thread after reallocation; together no more than all have at the start.
    static constexpr int kLoadRegisters = 40;
    static constexpr int kScoreRegisters = kGroups == 1 ? 216 : 104;
    static constexpr int kStateRegisters = kGroups == 1 ? 240 : 184;
    static_assert(kLoadRegisters + kScoreRegisters + kGroups * kStateRegisters <=
                      65536 / kThreads / 8 * 8 * (2 + kGroups),
                  "an SM has 65,536 registers");

    static constexpr uint32_t kTile = Tiles::kBytes;  // 64 tokens x 64 columns
    static constexpr int kStages = kSummary || kGroups == 1 ? 4 : 3;
    static constexpr int kParts = kSummary || kGroups == 1 ? 2 : 1;  // buffers of the decayed values
    static constexpr int kBoxTokens = kChunk / kCluster;             // of one box of Q or K
    static constexpr uint32_t kStageBytes = ((kSummary ? 2 : 4) + kGroups) * kTile;

    struct Shared {
        alignas(1024) char q[kSummary ? 1 : kStages][kSummary ? 1024 : 2 * kTile];
        alignas(1024) char k[kStages][2 * kTile];
        alignas(1024) char v[kStages][kGroups * kTile];  // later the chunk's output
        alignas(1024) char score[2][kSummary ? 1024 : kTile];
        alignas(1024) char high[kParts][kGroups * kTile];  // V * to_end rounded, and the rounded rest
        alignas(1024) char low[kParts][kGroups * kTile];
        ChunkDecay decay[kStages];
        // full: by the loading warp and the copy engine; empty: by the state warps (of the cluster). score, part: made
        // by the scoring warps, used up by the state warps.
        alignas(8) uint64_t full[kStages];
        uint64_t empty[kStages];
        uint64_t score_full[2];
        uint64_t score_empty[2];
        uint64_t part_full[kParts];
        uint64_t part_empty[kParts];
    };
    static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to start at a multiple of 1024
    static_assert(kSharedBytes <= 227 * 1024, "what a CTA of sm_90 may have");

    static MXC_DEVICE void run(const Args& args, char* memory) {
        Shared& shared = *reinterpret_cast<Shared*>(memory + (1024 - sharedAddress(memory) % 1024) % 1024);
        const int thread = static_cast<int>(threadIdx.x);
        const PrefillPiece piece(args.prefill, kDim, kSplits, args.prefill.segments - (kSummary ? 1 : 0));
        const auto base = static_cast<uint32_t>(warpUniform(static_cast<int>(sharedAddress(&shared))));

        if (thread == 0) {
            constexpr int kStateWarps = kGroups * 4;
            for (int stage = 0; stage < kStages; ++stage) {
                barrierInit(base + Ring::full(stage), 1);
                barrierInit(base + Ring::empty(stage), kStateWarps * kCluster);
            }
            for (int i = 0; i < 2; ++i) {
                barrierInit(base + Ring::scoreFull(i), 4);
                barrierInit(base + Ring::scoreEmpty(i), kStateWarps);
            }
            for (int i = 0; i < kParts; ++i) {
                barrierInit(base + Ring::partFull(i), 4);
                barrierInit(base + Ring::partEmpty(i), kStateWarps);
            }
            barrierInitFence();
        }
        syncAll();
        const int group = warpUniform(thread / 128), warp = warpUniform(thread % 128 / 32), lane = thread % 32;
        if (group == 0) {
            giveRegistersBack<kLoadRegisters>();
            if (warp == 0) load(args, shared, base, piece, lane);
        } else if (group == 1) {
            if constexpr (kGroups == 1) {
                takeRegisters<kScoreRegisters>();
            } else {
                giveRegistersBack<kScoreRegisters>();
            }
            score(args.prefill, shared, base, piece, warp, lane);
        } else {
            takeRegisters<kStateRegisters>();
            walk(args, base, piece, group - 2, warp, lane);
        }
        if (kCluster > 1) syncCluster();  // a CTA's memory must outlive what the other one sends there
    }

  private:
    // Offsets in Shared.
    struct Ring {
        template <size_t kOffset, uint32_t kBytes>
        static MXC_DEVICE uint32_t entry(int index) {
            return static_cast<uint32_t>(kOffset) + static_cast<uint32_t>(index) * kBytes;
        }
        static MXC_DEVICE uint32_t q(int stage) { return entry<offsetof(Shared, q), sizeof(Shared::q[0])>(stage); }
        static MXC_DEVICE uint32_t k(int stage) { return entry<offsetof(Shared, k), 2 * kTile>(stage); }
        static MXC_DEVICE uint32_t v(int stage) { return entry<offsetof(Shared, v), kGroups * kTile>(stage); }
        static MXC_DEVICE uint32_t decay(int stage) {
            return entry<offsetof(Shared, decay), sizeof(ChunkDecay)>(stage);
        }
        static MXC_DEVICE uint32_t score(int chunk) { return entry<offsetof(Shared, score), kTile>(chunk % 2); }
        static MXC_DEVICE uint32_t high(int chunk) {
            return entry<offsetof(Shared, high), kGroups * kTile>(chunk % kParts);
        }
        static MXC_DEVICE uint32_t low(int chunk) {
            return entry<offsetof(Shared, low), kGroups * kTile>(chunk % kParts);
        }
        static MXC_DEVICE uint32_t full(int chunk) { return entry<offsetof(Shared, full), 8>(chunk % kStages); }
        static MXC_DEVICE uint32_t empty(int chunk) { return entry<offsetof(Shared, empty), 8>(chunk % kStages); }
        static MXC_DEVICE uint32_t scoreFull(int chunk) { return entry<offsetof(Shared, score_full), 8>(chunk % 2); }
        static MXC_DEVICE uint32_t scoreEmpty(int chunk) { return entry<offsetof(Shared, score_empty), 8>(chunk % 2); }
        static MXC_DEVICE uint32_t partFull(int chunk) { return entry<offsetof(Shared, part_full), 8>(chunk % kParts); }
        static MXC_DEVICE uint32_t partEmpty(int chunk) {
            return entry<offsetof(Shared, part_empty), 8>(chunk % kParts);
        }
    };

    static MXC_DEVICE void syncAll() {
        if (kCluster > 1) {
            syncCluster();
        } else {
            syncBlock();
        }
    }
    // Waits until the chunk's entry of a ring of `size` is filled ...
    static MXC_DEVICE void waitFilled(uint32_t barrier, int chunk, int size) { barrierWait(barrier, chunk / size & 1); }
    // ... or, before it is filled, until its last use (by chunk - size) is over.
    static MXC_DEVICE void waitFree(uint32_t barrier, int chunk, int size) {
        if (chunk >= size) barrierWait(barrier, (chunk / size - 1) & 1);
    }
    // One arrival for the whole warp, after all its lanes' accesses.
    static MXC_DEVICE void arriveWarp(uint32_t barrier, int lane) {
        syncWarp();
        if (lane == 0) barrierArrive(barrier);
    }

    // ---- loading

    static MXC_DEVICE void loadBoxes(const Args& args, uint32_t base, const PrefillPiece& piece, int chunk) {
        const int stage = chunk % kStages, head = piece.head, batch = piece.batch;
        const uint32_t barrier = base + Ring::full(stage);
        barrierExpect(barrier, kStageBytes);
        const int first = kCluster > 1 ? piece.split * kBoxTokens : 0;  // this CTA's tokens of the shared tiles
        const int token = static_cast<int>(piece.first_token) + chunk * kChunk;
        const uint32_t rows = base + static_cast<uint32_t>(first) * kSwizzleRowBytes;
        for (int tile = 0; tile < 2; ++tile) {
            const uint32_t q = rows + Ring::q(stage) + static_cast<uint32_t>(tile) * kTile,
                           k = rows + Ring::k(stage) + static_cast<uint32_t>(tile) * kTile;
            if constexpr (kCluster > 1) {
                copyBoxMulticast(k, args.k, barrier, 3, tile * 64, head, token + first, batch);
                copyBoxMulticast(q, args.q, barrier, 3, tile * 64, head, token + first, batch);
            } else {
                copyBox(k, args.k, barrier, tile * 64, head, token, batch);
                if constexpr (!kSummary) copyBox(q, args.q, barrier, tile * 64, head, token, batch);
            }
        }
        for (int tile = 0; tile < kGroups; ++tile) {
            copyBox(base + Ring::v(stage) + static_cast<uint32_t>(tile) * kTile, args.v, barrier,
                    piece.split * kValues + tile * 64, head, token, batch);
        }
    }

    // 64 columns per tile; rows past `valid` become zeros and are not read.
    static MXC_DEVICE void loadRows(uint32_t to, const uint16_t* rows, int64_t row_stride, int tiles, int valid,
                                    int lane) {
#pragma unroll 1
        for (int i = lane; i < kChunk * tiles * 8; i += 32) {
            const int piece = i % 8, row = i / 8 % kChunk, tile = i / 8 / kChunk;
            copyAsync16(to + static_cast<uint32_t>(tile) * kTile + swizzledOffset(row, piece),
                        rows + (row < valid ? row * row_stride : 0) + tile * 64 + piece * 8, row < valid);
        }
    }

    static MXC_DEVICE void load(const Args& args, Shared& shared, uint32_t base, const PrefillPiece& piece, int lane) {
        const PrefillArgs& prefill = args.prefill;
        DecayReader reader;
#pragma unroll 1
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            const int stage = chunk % kStages, valid = piece.validOf(chunk);
            if (piece.perToken()) {  // ahead of its use
                reader.fetch(piece.log_decay + static_cast<int64_t>(chunk) * kChunk * prefill.heads, prefill.heads,
                             valid);
            }
            waitFree(base + Ring::empty(chunk), chunk, kStages);
            if (valid == kChunk) {
                if (lane == 0) loadBoxes(args, base, piece, chunk);
            } else {
                const int64_t stride = piece.row_stride;
                const int64_t first = piece.first_row * kDim + static_cast<int64_t>(chunk) * kChunk * stride;
                if (!kSummary) loadRows(base + Ring::q(stage), prefill.q + first, stride, 2, valid, lane);
                loadRows(base + Ring::k(stage), prefill.k + first, stride, 2, valid, lane);
                loadRows(base + Ring::v(stage), prefill.v + first + piece.split * kValues, stride, kGroups, valid,
                         lane);
                copyAsyncCommit();
                copyAsyncWait<0>();
                fenceAsyncShared();
            }
            reader.store(shared.decay[stage], piece.perToken(), piece.slope, prefill.scale, valid);
            arriveWarp(base + Ring::full(chunk), lane);
        }
    }

    // ---- scoring

    static MXC_DEVICE void score(const PrefillArgs& args, Shared& shared, uint32_t base, const PrefillPiece& piece,
                                 int warp, int lane) {
        const int i0 = warp * 16 + lane / 4, j0 = lane % 4 * 2;
        const bool per_token = piece.perToken();
        float factor[8][4];
        if (!kSummary && !per_token) Tiles::scoreFactors(factor, piece.slope, args.scale, i0, j0);
#pragma unroll 1
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            const int stage = chunk % kStages;
            const ChunkDecay& decay = shared.decay[stage];
            waitFilled(base + Ring::full(chunk), chunk, kStages);
            if constexpr (!kSummary) {
                float p[8][4];
                Tiles::issueScores(p, base + Ring::q(stage), base + Ring::k(stage));
                wgmmaWait<0>();
                pinRegisters(p);
                if (per_token) {
                    Tiles::template decayScores<true>(p, factor, decay, args.scale, i0, j0);
                } else {
                    Tiles::template decayScores<false>(p, factor, decay, args.scale, i0, j0);
                }
                waitFree(base + Ring::scoreEmpty(chunk), chunk, 2);
                Tiles::storeScores(p, base + Ring::score(chunk), warp, lane);
                fenceAsyncShared();
                arriveWarp(base + Ring::scoreFull(chunk), lane);
            }
            waitFree(base + Ring::partEmpty(chunk), chunk, kParts);
            Tiles::template splitValues<kGroups>(base + Ring::v(stage), base + Ring::high(chunk),
                                                 base + Ring::low(chunk), decay, warp * 32 + lane);
            fenceAsyncShared();
            arriveWarp(base + Ring::partFull(chunk), lane);
        }
    }

    // ---- state

    // This warpgroup's output (its products have just been waited for), through V's place.
    static MXC_DEVICE void sendOutput(const Args& args, float (&o)[8][4], uint32_t v, const PrefillPiece& piece,
                                      int chunk, int group, int warp, int lane) {
        Tiles::clearPastLength(o, piece.validOf(chunk), lane);
        syncThreads(1 + group, 128);  // V's readers are done in all warps
        Tiles::storeOutput(o, v, warp, lane);
        fenceAsyncShared();
        syncThreads(1 + group, 128);
        if (warp == 0 && lane == 0) {
            storeBox(args.out, v, piece.split * kValues + group * 64, piece.head,
                     static_cast<int>(piece.first_token) + chunk * kChunk, piece.batch);
            storeBoxCommit();
        }
    }

    static MXC_DEVICE void walk(const Args& args, uint32_t base, const PrefillPiece& piece, int group, int warp,
                                int lane) {
        const PrefillArgs& prefill = args.prefill;
        const uint32_t tile = static_cast<uint32_t>(group) * kTile;
        const int value0 = piece.split * kValues + group * 64 + warp * 16;
        float state[kDim / 8][4];
        loadState<kDim>(state, kSummary ? nullptr : piece.initialState(prefill, kDim * kDim), value0);
        float total_log = 0.0f;
#pragma unroll 1
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            pinRegister(lane);  // what hangs on it is made anew in each chunk; kept it would fill the registers
            const int stage = chunk % kStages;
            const uint32_t v = base + Ring::v(stage) + tile, decay = base + Ring::decay(stage);
            float o[8][4];
            waitFilled(base + Ring::full(chunk), chunk, kStages);
            if constexpr (!kSummary) {
                Tiles::issueReadOut(o, state, base + Ring::q(stage));
                float2 from_start[8];
#pragma unroll
                for (int nt = 0; nt < 8; ++nt) {
                    from_start[nt] = loadSharedFloat2(decay + offsetof(ChunkDecay, from_start) +
                                                      static_cast<uint32_t>(nt * 32 + lane % 4 * 8));
                }
                waitFilled(base + Ring::scoreFull(chunk), chunk, 2);
                wgmmaWait<0>();
                pinRegisters(o);
#pragma unroll
                for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) o[nt][r] *= r % 2 == 0 ? from_start[nt].x : from_start[nt].y;
                }
                pinRegisters(o);
                Tiles::issueValues(o, v, base + Ring::score(chunk));
            }
            waitFilled(base + Ring::partFull(chunk), chunk, kParts);  // from here on the scoring group needs V no more
            float added[kDim / 8][4];
            Tiles::issueUpdate(added, base + Ring::high(chunk) + tile, base + Ring::low(chunk) + tile,
                               base + Ring::k(stage));
            const float whole = loadSharedFloat(decay + offsetof(ChunkDecay, whole));
            if (kSummary) total_log += loadSharedFloat(decay + offsetof(ChunkDecay, whole_log));
            if constexpr (!kSummary) {
                wgmmaWait<1>();  // the output is there; the update goes on beside its way out
                pinRegisters(o);
                arriveWarp(base + Ring::scoreEmpty(chunk), lane);
                sendOutput(args, o, v, piece, chunk, group, warp, lane);
            }
            wgmmaWait<0>();
            pinRegisters(added);
            arriveWarp(base + Ring::partEmpty(chunk), lane);
#pragma unroll
            for (int nt = 0; nt < kDim / 8; ++nt) {
#pragma unroll
                for (int r = 0; r < 4; ++r) state[nt][r] = state[nt][r] * whole + added[nt][r];
            }
            // The stage is free: its output has left, and the scoring group had done with it before its results came.
            if (!kSummary && warp == 0 && lane == 0) storeBoxWaitRead();
            syncWarp();
            if constexpr (kCluster > 1) {
                if (lane < kCluster) barrierArriveAt(base + Ring::empty(chunk), lane);
            } else {
                if (lane == 0) barrierArrive(base + Ring::empty(chunk));
            }
        }

        if (kSummary) {
            storeState<kDim>(state, prefill.segment_states + piece.state_index * (kDim * kDim), value0);
            if (group == 0 && warp == 0 && lane == 0) prefill.segment_decays[piece.state_index] = expf(total_log);
            return;
        }
        float* final_state = piece.finalState(prefill, kDim * kDim);
        if (final_state != nullptr) storeState<kDim>(state, final_state, value0);
        clearRest<kValues>(prefill.out + piece.first_row * kDim + piece.split * kValues, piece,
                           (group * 4 + warp) * 32 + lane, kGroups * 128);
    }
};

}  // namespace mxc
