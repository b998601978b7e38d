// Lightning attention prefill for sm_90a, head_dim 128: the algebra of prefill_portable.cuh on warpgroup products.
//
// One CTA per (sequence, head, value part, segment). Two warps load: they copy the chunks' Q, K and V into a ring of
// four stages (swizzled for wgmma, rows past the length as zeros) and make their decays. One or two warpgroups compute,
// each with 64 value columns of the state in fp32 registers:
//   P   = decayed lower triangle of Q K^T, whose product was issued one chunk before
//   O^T = S^T Q^T                       S^T from registers (rounded to 16 bits as an operand), Q from shared memory
//   O^T = O^T * from_start + V^T P^T    V^T from registers
//   next chunk's Q K^T                  runs beside the following products
//   S^T = S^T * whole + (V * to_end)^T K, the chunk's part summed apart, 64 keys at a time
// Ordinary cp.async fills the ring rather than TMA: tokens past a sequence's length must not be read (they may be NaN,
// and what follows a row in a batch is the next sequence), which a rectangular box cannot express. The copying thread
// waits for its copies, fences towards the matrix units, then arrives, so a stage's arrivals order its data before
// wgmma's reads.
#pragma once

#include <cstddef>

#include "mxc/hopper.cuh"
#include "prefill_common.cuh"

namespace mxc {

template <class Element, int kSplits>
struct PrefillSm90 {
    using Args = PrefillArgs;
    static constexpr int kDim = 128;
    static constexpr int kChunk = kLightningChunk;
    static constexpr int kValues = kDim / kSplits;
    static constexpr int kGroups = kValues / 64;  // computing warpgroups
    static constexpr int kLoaders = 64;           // threads that load
    static constexpr int kThreads = kGroups * 128 + kLoaders;
    static constexpr int kMinBlocks = 1;
    static constexpr int kScoreColumns = kChunk / kGroups;  // of P, made by one warpgroup

    static constexpr int kStages = 4;
    // A stage is announced when this many later ones have been started. A computing group needs chunk c + 1 before it
    // releases c, and the loader starts c + 3 only after c - 1 is released: kStages >= kBehind + 2 keeps both going.
    static constexpr int kBehind = 2;
    static_assert(kStages >= kBehind + 2, "the ring would wait for itself");

    static constexpr uint32_t kTileBytes = kChunk * kSwizzleRowBytes;  // 64 tokens x 64 columns
    struct Shared {
        alignas(1024) char q[kStages][2 * kTileBytes];
        alignas(1024) char k[kStages][2 * kTileBytes];
        alignas(1024) char v[kStages][kGroups * kTileBytes];
        alignas(1024) char score[2][kTileBytes];
        ChunkDecay decay[kStages];
        DecayTable table;
        alignas(8) uint64_t full[kStages];
        uint64_t empty[kStages];
    };
    static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to start at a multiple of 1024
    static_assert(kSharedBytes <= 227 * 1024, "what a CTA of sm_90 may have");

    static MXC_DEVICE void run(const Args& args, char* memory) {
        Shared& shared = *reinterpret_cast<Shared*>(memory + (1024 - sharedAddress(memory) % 1024) % 1024);
        const int thread = static_cast<int>(threadIdx.x);
        const PrefillPiece piece(args, kDim, kSplits, args.segments);

        if (thread == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                barrierInit(&shared.full[stage], kLoaders);
                barrierInit(&shared.empty[stage], kGroups * 4);
            }
            barrierInitFence();
        }
        if (!piece.perToken()) shared.table.fill(piece.slope, thread, kThreads);
        syncBlock();

        if (thread >= kGroups * 128) {
            loadChunks(args, shared, piece, thread - kGroups * 128);
        } else {
            compute(args, shared, piece, thread / 128, thread % 128 / 32, thread % 32);
        }
    }

  private:
    // Starts the copy of a chunk's columns (64 per tile); rows past `valid` become zeros and are not read.
    template <int kTiles>
    static MXC_DEVICE void fetchTiles(uint32_t to, const uint16_t* rows, int64_t row_stride, int valid, int thread) {
        constexpr int kPieces = kTiles * 8;        // 16-byte pieces of a row
        constexpr int kRows = kLoaders / kPieces;  // copied at once
        static_assert(kRows % 4 == 0, "a thread's rows swizzle in one or two ways");
        const int first = thread / kPieces, piece = thread % kPieces;
        const uint32_t tile = to + static_cast<uint32_t>(piece / 8) * kTileBytes;
        const uint32_t even = tile + swizzledOffset(first, piece % 8);
        const uint32_t odd = tile + swizzledOffset(first + kRows, piece % 8) - kRows * kSwizzleRowBytes;
        const uint16_t* from = rows + piece * 8 + (first < valid ? first * row_stride : 0);
#pragma unroll 4
        for (int row = 0; row < kChunk; row += kRows) {
            copyAsync16((row / kRows % 2 == 0 ? even : odd) + static_cast<uint32_t>(row) * kSwizzleRowBytes, from,
                        first + row < valid);
            if (first + row + kRows < valid) from += kRows * row_stride;  // an absent row is not read
        }
    }

    static MXC_DEVICE void announce(Shared& shared, int chunk) {
        fenceAsyncShared();
        barrierArrive(&shared.full[chunk % kStages]);
    }

    static MXC_DEVICE void loadChunks(const Args& args, Shared& shared, const PrefillPiece& piece, int thread) {
        const uint16_t* q = args.q + piece.first_row * kDim;
        const uint16_t* k = args.k + piece.first_row * kDim;
        const uint16_t* v = args.v + piece.first_row * kDim + piece.split * kValues;
        const uint32_t q_tiles = sharedAddress(shared.q), k_tiles = sharedAddress(shared.k),
                       v_tiles = sharedAddress(shared.v);
        const int64_t chunk_stride = kChunk * piece.row_stride;
        const bool decays = thread < 32;
        DecayReader reader;
#pragma unroll 1
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            const int stage = chunk % kStages, valid = piece.validOf(chunk);
            if (decays && piece.perToken()) {
                reader.fetch(piece.log_decay + static_cast<int64_t>(chunk) * kChunk * args.heads, args.heads, valid);
            }
            if (chunk >= kStages) barrierWait(&shared.empty[stage], (chunk / kStages - 1) & 1);
            fetchTiles<2>(q_tiles + static_cast<uint32_t>(stage) * 2 * kTileBytes, q, piece.row_stride, valid, thread);
            fetchTiles<2>(k_tiles + static_cast<uint32_t>(stage) * 2 * kTileBytes, k, piece.row_stride, valid, thread);
            fetchTiles<kGroups>(v_tiles + static_cast<uint32_t>(stage) * kGroups * kTileBytes, v, piece.row_stride,
                                valid, thread);
            copyAsyncCommit();
            q += chunk_stride;
            k += chunk_stride;
            v += chunk_stride;
            if (decays) reader.store(shared.decay[stage], piece.perToken(), piece.slope, args.scale, valid);
            if (chunk >= kBehind) {
                copyAsyncWait<kBehind>();
                announce(shared, chunk - kBehind);
            }
        }
        copyAsyncWait<0>();
        for (int chunk = piece.chunks < kBehind ? 0 : piece.chunks - kBehind; chunk < piece.chunks; ++chunk)
            announce(shared, chunk);
    }

    // Address of entry `index`, of so many tiles, of the member of Shared at `offset`.
    static MXC_DEVICE uint32_t tileAt(int base, size_t offset, int index, int tiles) {
        return static_cast<uint32_t>(base) + static_cast<uint32_t>(offset) +
               static_cast<uint32_t>(index * tiles) * kTileBytes;
    }

    // Starts this group's columns of Q K^T of the chunk in `stage`.
    static MXC_DEVICE void issueScores(float (&p)[kScoreColumns / 8][4], uint32_t q, uint32_t k, int group) {
        const uint32_t rows = k + static_cast<uint32_t>(group * kScoreColumns) * kSwizzleRowBytes;
#pragma unroll
        for (int kt = 0; kt < kDim / 16; ++kt) {
            const uint32_t along = static_cast<uint32_t>(kt / 4) * kTileBytes + static_cast<uint32_t>(kt % 4) * 32;
            Wgmma<Element, kScoreColumns>::template fromShared<0>(p, swizzledDescriptor(q + along),
                                                                  swizzledDescriptor(rows + along), kt > 0);
        }
    }

    // V^T of 16 tokens, this warp's 16 values: tiles (tokens 0-7, values 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15),
    // transposed.
    static MXC_DEVICE void loadValues(uint32_t (&values)[4], uint32_t v, int jt, int warp, int lane) {
        const int token = jt * 16 + lane / 16 * 8 + lane % 8;
        loadMatrix4Transposed(values, v + swizzledOffset(token, warp * 2 + lane / 8 % 2));
    }

    template <bool kPerToken>
    static MXC_DEVICE void storeScores(const ChunkDecay& decay, const DecayTable& table,
                                       const float (&p)[kScoreColumns / 8][4], uint32_t score, float scale, int i0,
                                       int group, int lane) {
#pragma unroll
        for (int nt = 0; nt < kScoreColumns / 8; ++nt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = i0 + 8 * half, tile = group * (kScoreColumns / 8) + nt, j = tile * 8 + lane % 4 * 2;
                const float low = decayedScore<kPerToken>(decay, table, p[nt][2 * half], scale, i, j);
                const float high = decayedScore<kPerToken>(decay, table, p[nt][2 * half + 1], scale, i, j + 1);
                storeShared32(score + swizzledOffset(i, tile) + static_cast<uint32_t>(lane % 4 * 4),
                              pack<Element>(low, high));
            }
        }
    }

    static MXC_DEVICE void compute(const Args& args, Shared& shared, const PrefillPiece& piece, int group, int warp,
                                   int lane) {
        const int value0 = piece.split * kValues + group * 64 + warp * 16;
        int base = static_cast<int>(sharedAddress(&shared));
        uint16_t* out = args.out + piece.first_row * kDim + value0;
        const bool per_token = piece.perToken();

        float state[kDim / 8][4];
        loadState<kDim>(state, piece.initialState(args, kDim * kDim), value0);
        float p[kScoreColumns / 8][4];
        if (piece.chunks > 0) {
            barrierWait(&shared.full[0], 0);
            wgmmaFence();
            issueScores(p, tileAt(base, offsetof(Shared, q), 0, 2), tileAt(base, offsetof(Shared, k), 0, 2), group);
            wgmmaCommit();
            wgmmaWait<0>();
            pinRegisters(p);
        }
#pragma unroll 1
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            // What hangs on these is made anew in each chunk; kept from chunk to chunk it would fill the registers.
            pinRegister(lane);
            pinRegister(base);
            const int stage = chunk % kStages, token0 = chunk * kChunk;
            const ChunkDecay& decay = shared.decay[stage];
            const uint32_t q = tileAt(base, offsetof(Shared, q), stage, 2),
                           k = tileAt(base, offsetof(Shared, k), stage, 2);
            const uint32_t v =
                tileAt(base, offsetof(Shared, v), stage, kGroups) + static_cast<uint32_t>(group) * kTileBytes;
            const uint32_t score = tileAt(base, offsetof(Shared, score), chunk % 2, 1);

            // P: decay, round, to shared memory
            if (per_token) {
                storeScores<true>(decay, shared.table, p, score, args.scale, warp * 16 + lane / 4, group, lane);
            } else {
                storeScores<false>(decay, shared.table, p, score, args.scale, warp * 16 + lane / 4, group, lane);
            }
            fenceAsyncShared();

            // O^T = S^T Q^T, while the other warps write their P
            float o[kChunk / 8][4];
            {
                uint32_t a[kDim / 16][4];
#pragma unroll
                for (int kt = 0; kt < kDim / 16; ++kt) {
                    a[kt][0] = pack<Element>(state[2 * kt][0], state[2 * kt][1]);
                    a[kt][1] = pack<Element>(state[2 * kt][2], state[2 * kt][3]);
                    a[kt][2] = pack<Element>(state[2 * kt + 1][0], state[2 * kt + 1][1]);
                    a[kt][3] = pack<Element>(state[2 * kt + 1][2], state[2 * kt + 1][3]);
                }
                wgmmaFence();
#pragma unroll
                for (int kt = 0; kt < kDim / 16; ++kt) {
                    const uint32_t along =
                        static_cast<uint32_t>(kt / 4) * kTileBytes + static_cast<uint32_t>(kt % 4) * 32;
                    Wgmma<Element, kChunk>::template fromRegisters<0>(o, a[kt], swizzledDescriptor(q + along), kt > 0);
                }
                wgmmaCommit();
            }
            syncThreads(1, kGroups * 128);

            wgmmaWait<0>();
            pinRegisters(o);
#pragma unroll
            for (int nt = 0; nt < kChunk / 8; ++nt) {
                const float low = decay.from_start[nt * 8 + lane % 4 * 2];
                const float high = decay.from_start[nt * 8 + lane % 4 * 2 + 1];
                o[nt][0] *= low;
                o[nt][1] *= high;
                o[nt][2] *= low;
                o[nt][3] *= high;
            }

            // O^T += V^T P^T
            uint32_t values[kChunk / 16][4];
#pragma unroll
            for (int jt = 0; jt < kChunk / 16; ++jt) loadValues(values[jt], v, jt, warp, lane);
            pinRegisters(o);
            wgmmaFence();
#pragma unroll
            for (int jt = 0; jt < kChunk / 16; ++jt) {
                Wgmma<Element, kChunk>::template fromRegisters<0>(
                    o, values[jt], swizzledDescriptor(score + static_cast<uint32_t>(jt) * 32), 1);
            }
            wgmmaCommit();
            wgmmaWait<0>();
            pinRegisters(o);
            storeOutput<Element>(o, out + static_cast<int64_t>(token0) * piece.row_stride, piece.row_stride,
                                 piece.valid - token0, piece.end_token - static_cast<int>(piece.first_token) - token0);

            // The next chunk's scores, beside what follows. After the last chunk the product is made all the same, of
            // whatever the ring holds, and not used: products in a branch would be serialised.
            const int next = (chunk + 1) % kStages;
            if (chunk + 1 < piece.chunks) barrierWait(&shared.full[next], ((chunk + 1) / kStages) & 1);
            pinRegisters(p);
            wgmmaFence();
            issueScores(p, tileAt(base, offsetof(Shared, q), next, 2), tileAt(base, offsetof(Shared, k), next, 2),
                        group);
            wgmmaCommit();

            // S^T = S^T * whole + (V * to_end)^T K
            // Half of the tokens and half of the keys at a time: products that wait hold their operands in registers,
            // and where two groups compute (and a quarter of an SM holds three warps) a thread has 168.
            constexpr int kTokenTiles = kChunk / 32;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t high[kTokenTiles][4], low[kTokenTiles][4];
#pragma unroll
                for (int jt = 0; jt < kTokenTiles; ++jt) {
                    uint32_t pairs[4];  // read again, rather than kept beside O
                    loadValues(pairs, v, half * kTokenTiles + jt, warp, lane);
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int token = (half * kTokenTiles + jt) * 16 + r / 2 * 8 + lane % 4 * 2;
                        splitProduct<Element>(pairs[r], decay.to_end[token], decay.to_end[token + 1], high[jt][r],
                                              low[jt][r]);
                    }
                }
                const float kept = half == 0 ? decay.whole : 1.0f;
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    float added[8][4];
                    wgmmaFence();
#pragma unroll
                    for (int jt = 0; jt < kTokenTiles; ++jt) {
                        const uint64_t keys =
                            swizzledDescriptor(k + static_cast<uint32_t>(part) * kTileBytes +
                                               static_cast<uint32_t>(half * kTokenTiles + jt) * 2 * kSwizzleAtomBytes);
                        Wgmma<Element, 64>::template fromRegisters<1>(added, low[jt], keys, jt > 0);
                        Wgmma<Element, 64>::template fromRegisters<1>(added, high[jt], keys, 1);
                    }
                    wgmmaCommit();
                    wgmmaWait<0>();
                    pinRegisters(added);
#pragma unroll
                    for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            state[part * 8 + nt][r] = state[part * 8 + nt][r] * kept + added[nt][r];
                        }
                    }
                }
            }
            pinRegisters(p);
            syncWarp();
            if (lane == 0) barrierArrive(&shared.empty[stage]);
        }

        float* final_state = piece.finalState(args, kDim * kDim);
        if (final_state != nullptr) storeState<kDim>(state, final_state, value0);
        clearRest<kValues>(args.out + piece.first_row * kDim + piece.split * kValues, piece,
                           static_cast<int>(threadIdx.x), kGroups * 128);
    }
};

}  // namespace mxc
