// What every prefill kernel is given, and how a CTA finds its piece of work. No CUDA calls.
#pragma once

#include <cstdint>

#include "planner.h"

namespace mxc {

struct PrefillArgs {
    const uint16_t* q = nullptr;  // [B, T, H, D]; 16-bit elements, as k, v and out
    const uint16_t* k = nullptr;
    const uint16_t* v = nullptr;
    uint16_t* out = nullptr;
    const float* state_in = nullptr;  // [P, H, D, D] or null: zeros
    float* state_out = nullptr;
    const int32_t* slots = nullptr;
    const float* log_decay = nullptr;  // [B, T, H], or null: slopes
    const float* slopes = nullptr;     // [H]
    const int32_t* lengths = nullptr;
    float* segment_states =
        nullptr;  // [B, H, segments, D, D]: sums of the segments, then (after the scan) their initial states
    float* segment_decays = nullptr;  // [B, H, segments]: what a whole segment leaves of the state before it
    int32_t batch = 0;
    int32_t tokens = 0;
    int32_t heads = 0;
    int32_t slot_count = 0;
    int32_t segments = 1;
    int32_t segment_chunks = 0;
    float scale = 1.0f;
};

}  // namespace mxc
