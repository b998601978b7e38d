// Router and sort: which experts each token goes to, with which weights, and the rows of each local expert.
//
// Router: softmax in fp32 over all E logits, the k largest (equal logits: the lowest expert first), weights optionally
// divided by their sum. Experts are chosen by logit: the order of the probabilities without their rounding. NaN orders
// below every number and makes all weights of its token NaN; the experts chosen are distinct and in range whatever the
// logits are.
//
// Sort: no atomics. The rows of an expert are its pairs in increasing order, so they (and every sum over them) never
// change between runs. Counting the pairs of lower experts gives an expert's first row without a second kernel.
#pragma once

#include "moe_args.h"
#include "mxc/warp.cuh"

namespace mxc {

MXC_DEVICE float logitValue(const void* logits, int64_t index, int32_t dtype) {
    if (dtype == static_cast<int32_t>(DType::kFloat32)) return static_cast<const float*>(logits)[index];
    const uint32_t bits = static_cast<const uint16_t*>(logits)[index];
    return dtype == static_cast<int32_t>(DType::kBFloat16) ? unpackLow<BFloat16>(bits) : unpackLow<Half>(bits);
}

// One token, by one warp; lane l holds experts l, l + 32, ...
MXC_DEVICE void routeToken(const MoeArgs& args, int token) {
    constexpr int kHeld = kMoeMaxExperts / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float kLowest = -__builtin_huge_valf();

    float logit[kHeld];
    float largest = kLowest;
    bool poisoned = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int expert = lane + 32 * i;
        logit[i] = kLowest;
        if (expert < args.experts) {
            const float value =
                logitValue(args.logits, static_cast<int64_t>(token) * args.experts + expert, args.router_dtype);
            if (value != value) {
                poisoned = true;
            } else {
                logit[i] = value;
            }
        }
        largest = fmaxf(largest, logit[i]);
    }
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffleXor(largest, mask));
    poisoned = ballot(poisoned) != 0;

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (lane + 32 * i < args.experts)
            sum += expf(logit[i] - largest);  // NaN where all are -inf or one is +inf: as softmax
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffleXor(sum, mask);

    float weight[kMoeMaxTopK];
    int chosen[kMoeMaxTopK];
    uint32_t taken = 0;
    float weights = 0.0f;
#pragma unroll
    for (int choice = 0; choice < kMoeMaxTopK; ++choice) {
        weight[choice] = 0.0f;
        chosen[choice] = -1;
        if (choice >= args.top_k) continue;
        float best = kLowest;
        int best_expert = kMoeMaxExperts;  // none
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int expert = lane + 32 * i;
            const bool free = expert < args.experts && (taken >> i & 1u) == 0;
            if (free && (logit[i] > best || best_expert == kMoeMaxExperts)) {
                best = logit[i];
                best_expert = expert;
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffleXor(best, mask);
            const int other_expert = shuffleXor(best_expert, mask);
            const bool real = other_expert < kMoeMaxExperts;
            if (real &&
                (best_expert == kMoeMaxExperts || other > best || (other == best && other_expert < best_expert))) {
                best = other;
                best_expert = other_expert;
            }
        }
        if (best_expert % 32 == lane) taken |= 1u << (best_expert / 32);
        chosen[choice] = best_expert;
        weight[choice] = expf(best - largest) / sum;
        weights += weight[choice];
    }

    if (lane != 0) return;
    const float poison = poisoned ? __builtin_nanf("") : 0.0f;
#pragma unroll
    for (int choice = 0; choice < kMoeMaxTopK; ++choice) {
        if (choice >= args.top_k) continue;
        const int pair = token * args.top_k + choice;
        const int local = chosen[choice] - args.first_local;
        args.pair_weight[pair] = (args.normalize ? weight[choice] / weights : weight[choice]) + poison;
        args.pair_expert[pair] = local >= 0 && local < args.local_experts ? local : -1;
    }
}

// Over the pairs [begin, end), by one warp: how many go to lower local experts than this one, and how many to this one.
MXC_DEVICE void countPairs(const MoeArgs& args, int expert, int begin, int end, int& lower, int& equal) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    lower = 0;
    equal = 0;
    for (int pair = begin + lane; pair < end; pair += 32) {
        const int of = args.pair_expert[pair];
        lower += of >= 0 && of < expert ? 1 : 0;
        equal += of == expert ? 1 : 0;
    }
    lower = warpSum(lower);
    equal = warpSum(equal);
}

// Gives the pairs of [begin, end) that go to this expert the rows from `row` on, in order. By one warp.
MXC_DEVICE void placePairs(const MoeArgs& args, int expert, int begin, int end, int row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int first = begin; first < end; first += 32) {
        const int pair = first + lane;
        const bool mine = pair < end && args.pair_expert[pair] == expert;
        const uint32_t all = ballot(mine);
        if (mine) {
            const int place = row + popcount(all & ((1u << lane) - 1u));
            args.pair_row[pair] = place;
            args.row_token[place] = pair / args.top_k;
        }
        row += popcount(all);
    }
}

MXC_DEVICE void setOffset(const MoeArgs& args, int expert, int lower, int equal) {
    args.offsets[expert] = lower;
    if (expert == args.local_experts - 1) args.offsets[args.local_experts] = lower + equal;
}

// Grid: ceil(N / 8).
struct MoeRouter {
    using Args = MoeArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 2;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int token = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
        if (token < args.tokens) routeToken(args, token);
    }
};

// Grid: L, one block per local expert.
struct MoeSort {
    using Args = MoeArgs;
    static constexpr int kThreads = 512;
    static constexpr int kMinBlocks = 1;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kSharedBytes = 2 * kWarps * 4;

    static MXC_DEVICE void run(const Args& args, char* memory) {
        int* lower_of = reinterpret_cast<int*>(memory);
        int* equal_of = lower_of + kWarps;
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int expert = static_cast<int>(blockIdx.x);
        const int pairs = args.tokens * args.top_k;
        const int share = (pairs + kWarps - 1) / kWarps;
        const int begin = warp * share < pairs ? warp * share : pairs;
        const int end = begin + share < pairs ? begin + share : pairs;

        int lower, equal;
        countPairs(args, expert, begin, end, lower, equal);
        if (threadIdx.x % 32 == 0) {
            lower_of[warp] = lower;
            equal_of[warp] = equal;
        }
        syncBlock();
        int row = 0;  // first row of this warp's pairs
        int first = 0, total = 0;
        for (int w = 0; w < kWarps; ++w) {
            first += lower_of[w];
            total += equal_of[w];
            row += lower_of[w] + (w < warp ? equal_of[w] : 0);
        }
        placePairs(args, expert, begin, end, row);
        if (threadIdx.x == 0) setOffset(args, expert, first, total);
    }
};

// Router and sort of a few tokens in one block: one launch less in decode.
struct MoeSmallRoute {
    using Args = MoeArgs;
    static constexpr int kThreads = 512;
    static constexpr int kMinBlocks = 1;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        for (int token = warp; token < args.tokens; token += kWarps) routeToken(args, token);
        syncBlock();  // pair_expert, written by other warps of this block
        const int pairs = args.tokens * args.top_k;
        for (int expert = warp; expert < args.local_experts; expert += kWarps) {
            int lower, equal;
            countPairs(args, expert, 0, pairs, lower, equal);
            placePairs(args, expert, 0, pairs, lower);
            if (threadIdx.x % 32 == 0) setOffset(args, expert, lower, equal);
        }
    }
};

}  // namespace mxc
