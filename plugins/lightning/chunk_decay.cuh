// The decays of one chunk of C = 64 tokens, in shared memory. With G_i the sum of the log-decays of the chunk's tokens
// 0..i and n its valid tokens:
//   from_start[i] = scale * exp(G_i)      what token i still sees of the state before the chunk
//   to_end[j]     = exp(G_(n-1) - G_j)    what the state after the chunk keeps of token j (0 for j >= n)
//   whole         = exp(G_(n-1))
//   between(i, j) = exp(G_i - G_j), j <= i
// Every exponent is <= 0. With one slope per head, between(i, j) is exp(-slope * (i - j)), read from a table of 65
// entries.
#pragma once

#include "mxc/device.cuh"
#include "prefill_args.h"

namespace mxc {

struct ChunkDecay {
    float from_start[kLightningChunk];
    float to_end[kLightningChunk];
    float cumulative[kLightningChunk];  // G; only where the decay is per token
    float whole;
    float whole_log;  // G_(n-1)
    float padding[2];
};

// exp(-slope * d) at entry 64 + d for the distances d = 0..64 of two tokens, and zeros below: a warp's lookups then
// differ by constants only.
struct DecayTable {
    float power[2 * kLightningChunk + 1];
    float padding[3];

    MXC_DEVICE void fill(float slope, int thread, int threads) {
        for (int i = thread; i <= 2 * kLightningChunk; i += threads) {
            const int distance = i - kLightningChunk;
            power[i] = distance < 0 ? 0.0f : expf(-slope * static_cast<float>(distance));
        }
    }
};

// Called by all lanes of one warp. `log_decay` points at the chunk's first token of this head (stride `heads`), or is
// null.
struct DecayReader {
    float g[2] = {0.0f, 0.0f};

    // Fetches ahead of use: lane l holds tokens 2l and 2l+1.
    MXC_DEVICE void fetch(const float* log_decay, int64_t stride, int valid) {
        if (log_decay == nullptr) return;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        for (int i = 0; i < 2; ++i) {
            const int token = 2 * lane + i;
            g[i] = token < valid ? boundLogDecay(log_decay[token * stride]) : 0.0f;
        }
    }

    MXC_DEVICE void store(ChunkDecay& decay, bool per_token, float slope, float scale, int valid) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        if (per_token) {
            float sum = g[0] + g[1];
            for (int delta = 1; delta < 32; delta *= 2) {
                const float before = shuffleUp(sum, delta);
                if (lane >= delta) sum += before;
            }
            const float last = shuffle(sum, 31);  // tokens past the length add nothing
            float before = shuffleUp(sum, 1);
            if (lane == 0) before = 0.0f;
            const float G[2] = {before + g[0], sum};
            for (int i = 0; i < 2; ++i) {
                const int token = 2 * lane + i;
                decay.cumulative[token] = G[i];
                decay.from_start[token] = scale * expf(G[i]);
                decay.to_end[token] = token < valid ? expf(fminf(last - G[i], 0.0f)) : 0.0f;
            }
            if (lane == 0) {
                decay.whole_log = last;
                decay.whole = expf(last);
            }
        } else {
            for (int i = 0; i < 2; ++i) {
                const int token = 2 * lane + i;
                decay.from_start[token] = scale * expf(-slope * static_cast<float>(token + 1));
                decay.to_end[token] = token < valid ? expf(-slope * static_cast<float>(valid - 1 - token)) : 0.0f;
            }
            if (lane == 0) {
                decay.whole_log = -slope * static_cast<float>(valid);
                decay.whole = expf(decay.whole_log);
            }
        }
    }
};

// One element of P: score * scale * exp(G_i - G_j) for j <= i, else 0. Written without branches (the table has zeros
// for j > i), and selected rather than multiplied by 0, so that an overflowed product above the diagonal cannot become
// NaN.
template <bool kPerToken>
MXC_DEVICE float decayedScore(const ChunkDecay& decay, const DecayTable& table, float score, float scale, int i,
                              int j) {
    float between;
    if constexpr (kPerToken) {
        between = expf(fminf(decay.cumulative[i] - decay.cumulative[j], 0.0f));
    } else {
        between = table.power[kLightningChunk + i - j];
    }
    return j <= i ? score * (scale * between) : 0.0f;
}

}  // namespace mxc
