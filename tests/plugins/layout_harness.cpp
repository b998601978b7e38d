// Single instructions and steps of the kernels in the emulator, with every register in view; built by
// tests/plugins/test_cute_layouts.py, which compares their layouts with CuTe's.
#include <cstdint>

#include "lightning/sm90_tiles.cuh"
#include "moe/sm90_steps.cuh"
#include "mxc/tma.cuh"
#include "mxc_harness.h"

namespace {

using mxc::BFloat16;
using Tiles = mxc::Sm90Tiles<BFloat16>;
constexpr uint32_t kTile = Tiles::kBytes;
constexpr int kImage = 8 * static_cast<int>(kTile);

struct StepArgs {
    int step;
    const char* image;      // shared memory before ...
    char* image_out;        // ... and after
    const float* in;        // [128][64] accumulators of each thread
    float* out;             // [128][64]
    uint64_t* products;     // [32][6]: descriptors of A (0: registers) and B, transposed A and B, columns, keep
    uint32_t* registers_a;  // [32][128][4]
};

// A step of the sm_90a prefill by one warpgroup. Tiles in the image: 0, 1 Q; 2, 3 K; 4 V or its high part; 5 its low
// part; 6 scores; 7 output.
struct Step {
    using Args = StepArgs;
    static constexpr int kThreads = 128;
    static constexpr int kSharedBytes = kImage;

    static void run(const Args& args, char* memory) {
        const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
        const uint32_t base = mxc::sharedAddress(memory);
        if (thread == 0) memcpy(memory, args.image, kImage);
        mxc::syncBlock();
        float small[8][4], wide[16][4];
        memcpy(small, args.in + thread * 64, sizeof small);
        memcpy(wide, args.in + thread * 64, sizeof wide);
        const uint32_t q = base, k = base + 2 * kTile, v = base + 4 * kTile, low = base + 5 * kTile,
                       score = base + 6 * kTile, out = base + 7 * kTile;
        if (args.step == 0) Tiles::issueScores(small, q, k);
        if (args.step == 1) Tiles::issueReadOut(small, wide, q);
        if (args.step == 2) Tiles::issueValues(small, v, score);
        if (args.step == 3) Tiles::issueUpdate(wide, v, low, k);
        if (args.step == 4) Tiles::storeScores(small, score, warp, lane);
        if (args.step == 5) Tiles::storeOutput(small, out, warp, lane);
        mxc::wgmmaWait<0>();
        if (args.step == 3) {
            memcpy(args.out + thread * 64, wide, sizeof wide);
        } else {
            memcpy(args.out + thread * 64, small, sizeof small);
        }
        mxc::syncBlock();
        if (thread != 0) return;
        memcpy(args.image_out, memory, kImage);
        const auto& ops = mxc::emu::wgmmaGroups()[0].ops;
        for (size_t i = 0; i < ops.size(); ++i) {
            const auto& first = ops[i]->args[0];
            uint64_t* product = args.products + 6 * i;
            product[0] = first.a_shared ? first.a_descriptor : 0;
            product[1] = first.b_descriptor;
            product[2] = first.a_transposed;
            product[3] = first.transposed;
            product[4] = static_cast<uint64_t>(first.columns);
            product[5] = first.keep;
            for (int t = 0; t < 128; ++t) memcpy(args.registers_a + (i * 128 + t) * 4, ops[i]->args[t].a, 16);
        }
    }
};

struct WarpArgs {
    int instruction;
    const uint16_t* memory;     // [256] rows of 8, one named by each lane
    const uint32_t* registers;  // [32][6]
    const float* accumulators;  // [32][4]
    uint32_t* out;              // [32][4]
    float* accumulators_out;    // [32][4]
    uint16_t* memory_out;       // [256]
};

struct WarpInstruction {
    using Args = WarpArgs;
    static constexpr int kThreads = 32;
    static constexpr int kSharedBytes = 512;

    static void run(const Args& args, char* memory) {
        const int lane = static_cast<int>(threadIdx.x);
        if (lane == 0) memcpy(memory, args.memory, 512);
        mxc::syncBlock();
        const uint32_t row = mxc::sharedAddress(memory) + static_cast<uint32_t>(16 * lane);
        const uint32_t* in = args.registers + 6 * lane;
        uint32_t out[4] = {in[0], in[1], in[2], in[3]};
        float d[4];
        memcpy(d, args.accumulators + 4 * lane, sizeof d);
        if (args.instruction == 0) mxc::loadMatrix4(out, row);
        if (args.instruction == 1) mxc::loadMatrix4Transposed(out, row);
        if (args.instruction == 2) mxc::storeMatrix4(row, in[0], in[1], in[2], in[3]);
        if (args.instruction == 3) mxc::storeMatrix4Transposed(row, in[0], in[1], in[2], in[3]);
        if (args.instruction == 4) out[0] = mxc::transposeMatrix(in[0]);
        if (args.instruction == 5) {
            const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
            mxc::mma16816<BFloat16>(d, a, in[4], in[5]);
        }
        mxc::syncBlock();
        memcpy(args.out + 4 * lane, out, sizeof out);
        memcpy(args.accumulators_out + 4 * lane, d, sizeof d);
        if (lane == 0) memcpy(args.memory_out, memory, 512);
    }
};

struct BoxArgs {
    const uint16_t* rows;  // [64][64]
    char* image;           // as the copy engine leaves it
};

struct Box {
    using Args = BoxArgs;
    static constexpr int kThreads = 32;
    static constexpr int kSharedBytes = static_cast<int>(kTile) + 8;

    static void run(const Args& args, char* memory) {
        const uint32_t base = mxc::sharedAddress(memory), barrier = base + kTile;
        if (threadIdx.x == 0) mxc::barrierInit(barrier, 1);
        mxc::syncBlock();
        if (threadIdx.x == 0) {
            mxc::TensorMap map{};
            map.base = reinterpret_cast<char*>(const_cast<uint16_t*>(args.rows));
            const int64_t size[4] = {64, 1, 64, 1}, stride[4] = {2, 128, 128, 8192};
            for (int i = 0; i < 4; ++i) {
                map.size[i] = size[i];
                map.stride[i] = stride[i];
                map.box[i] = static_cast<int>(size[i]);
            }
            mxc::barrierExpect(barrier, kTile);
            mxc::copyBox(base, map, barrier, 0, 0, 0, 0);
            mxc::barrierArrive(barrier);
        }
        mxc::barrierWait(barrier, 0);
        if (threadIdx.x == 0) memcpy(args.image, memory, kTile);
    }
};

struct GatedArgs {
    const float* sums;     // [256][128]
    const int32_t* first;  // [256][2]: row and column of each thread's first sum
    uint16_t* out;         // [rows, columns]
    int rows, columns;
};

// fc1's epilogue on one tile, called as SwigluEpilogue (moe_sm90.cu) calls it.
struct Gated {
    using Args = GatedArgs;
    static constexpr int kThreads = 256;
    static constexpr int kSharedBytes = 16;

    static void run(const Args& args, char*) {
        const int thread = static_cast<int>(threadIdx.x);
        const float* sums = args.sums + thread * 128;
        const int32_t* first = args.first + 2 * thread;
        mxc::storeGated<BFloat16, 32>([&](int i) { return sums[i]; }, args.out, args.columns, first[0], args.rows,
                                      (first[1] - thread % 4 * 2) / 2, args.columns);
    }
};

template <class Kernel>
int launch(const typename Kernel::Args& args) {
    mxc::EmulatedRunner runner{0};
    return static_cast<int>(runner.run<Kernel>(1, args));
}

}  // namespace

extern "C" {

int run_step(int step, const char* image, char* image_out, const float* in, float* out, uint64_t* products,
             uint32_t* registers_a) {
    return launch<Step>({step, image, image_out, in, out, products, registers_a});
}
int run_warp(int instruction, const uint16_t* memory, const uint32_t* registers, const float* accumulators,
             uint32_t* out, float* accumulators_out, uint16_t* memory_out) {
    return launch<WarpInstruction>({instruction, memory, registers, accumulators, out, accumulators_out, memory_out});
}
int run_gated(const float* sums, const int32_t* first, uint16_t* out, int rows, int columns) {
    return launch<Gated>({sums, first, out, rows, columns});
}
int run_box(const uint16_t* rows, char* image) { return launch<Box>({rows, image}); }
}
