// What stands around the two grouped GEMMs of the sm_90a path: gathering the rows (TMA tiles cannot), the GEMMs'
// argument arrays (the rows of each expert are known on the device alone), and the epilogue that applies SwiGLU to
// fc1's sums. Runs on any GPU and in the emulator.
#pragma once

#include "expert_tile.cuh"

#if defined(__CUDACC__)
#define MXC_MOE_HOST_DEVICE __host__ __device__ inline
#else
#define MXC_MOE_HOST_DEVICE inline
#endif

namespace mxc {

// The arrays of one grouped GEMM: for each local expert D[rows, n] = A[rows, k] B[n, k]^T, all row-major and packed
// (fc1's D has n / 2 columns: gate and up are one).
struct GroupedProblem {
    struct Shape {
        int32_t m, n, k;
    };
    Shape* shapes;
    const void** a;
    const void** b;
    void** d;
    int64_t* stride_a;
    int64_t* stride_b;
    int64_t* stride_d;
};

constexpr size_t kGroupedArrayBytes = 4096;  // of one array: 256 experts of at most 16 bytes
constexpr size_t kGroupedProblemBytes = 7 * kGroupedArrayBytes;
static_assert(sizeof(GroupedProblem::Shape) == 12 && kMoeMaxExperts * 16 <= kGroupedArrayBytes, "the arrays fit");

// product: 0 fc1, 1 fc2.
MXC_MOE_HOST_DEVICE GroupedProblem groupedProblem(void* grouped, int product) {
    char* base = static_cast<char*>(grouped) + product * kGroupedProblemBytes;
    GroupedProblem out;
    out.shapes = reinterpret_cast<GroupedProblem::Shape*>(base);
    out.a = reinterpret_cast<const void**>(base + kGroupedArrayBytes);
    out.b = reinterpret_cast<const void**>(base + 2 * kGroupedArrayBytes);
    out.d = reinterpret_cast<void**>(base + 3 * kGroupedArrayBytes);
    out.stride_a = reinterpret_cast<int64_t*>(base + 4 * kGroupedArrayBytes);
    out.stride_b = reinterpret_cast<int64_t*>(base + 5 * kGroupedArrayBytes);
    out.stride_d = reinterpret_cast<int64_t*>(base + 6 * kGroupedArrayBytes);
    return out;
}

// Grid: 1.
struct MoeGroupedArguments {
    using Args = MoeArgs;
    static constexpr int kThreads = kMoeMaxExperts;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int expert = static_cast<int>(threadIdx.x);
        if (expert >= args.local_experts) return;
        const int64_t first = args.offsets[expert];
        const int rows = args.offsets[expert + 1] - args.offsets[expert];
        const int64_t hidden = args.hidden, inner = args.inner;
        set(args, 0, expert, {rows, 2 * args.inner, args.hidden}, args.x_rows + first * hidden,
            static_cast<const uint16_t*>(args.fc1) + expert * 2 * inner * hidden, args.inner_rows + first * inner,
            inner);
        set(args, 1, expert, {rows, args.hidden, args.inner}, args.inner_rows + first * inner,
            static_cast<const uint16_t*>(args.fc2) + expert * hidden * inner, args.out_rows + first * hidden, hidden);
    }

  private:
    static MXC_DEVICE void set(const Args& args, int product, int expert, GroupedProblem::Shape shape, const void* a,
                               const void* b, void* d, int64_t stride_d) {
        const GroupedProblem problem = groupedProblem(args.grouped, product);
        problem.shapes[expert] = shape;
        problem.a[expert] = a;
        problem.b[expert] = b;
        problem.d[expert] = d;
        problem.stride_a[expert] = shape.k;
        problem.stride_b[expert] = shape.k;
        problem.stride_d[expert] = stride_d;
    }
};

// x_rows[r] = x[token of row r]. Grid: R; rows past the last local one end at once.
struct MoeGatherRows {
    using Args = MoeArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 4;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int row = static_cast<int>(blockIdx.x);
        if (row >= args.offsets[args.local_experts]) return;
        const uint16_t* from = args.x + static_cast<int64_t>(args.row_token[row]) * args.hidden;
        uint16_t* to = args.x_rows + static_cast<int64_t>(row) * args.hidden;
        for (int column = static_cast<int>(threadIdx.x) * 8; column < args.hidden; column += kThreads * 8) {
            *reinterpret_cast<uint4*>(to + column) = loadCached16(from + column);
        }
    }
};

// Four 16-bit numbers of each lane of a quad, transposed: lane q has column q of tiles 0..3 and gets columns 0..3 of
// tile q.
template <class Element>
MXC_DEVICE uint2 transposeQuad(const float (&value)[4], int lane) {
    // Lanes 0, 1 give their tiles 2, 3 for the tiles 0, 1 of lanes 2, 3 ...
    const uint32_t first = pack<Element>(value[0], value[1]), second = pack<Element>(value[2], value[3]);
    const bool upper = (lane & 2) != 0, odd = (lane & 1) != 0;
    const uint32_t other = shuffleXor(upper ? first : second, 2);
    const uint32_t low = upper ? other : first, high = upper ? second : other;  // columns q % 2 and q % 2 + 2
    // ... then even lanes the odd tile for the even tile of odd lanes.
    const uint32_t kept = bytePermute(low, high, odd ? 0x7632u : 0x5410u);
    const uint32_t got = shuffleXor(bytePermute(low, high, odd ? 0x5410u : 0x7632u), 1);
    const uint32_t even_columns = odd ? got : kept, odd_columns = odd ? kept : got;  // (0, 2) and (1, 3)
    return make_uint2(bytePermute(even_columns, odd_columns, 0x5410u), bytePermute(even_columns, odd_columns, 0x7632u));
}

// The epilogue of fc1: a warp's fp32 sums of 16 rows and 8 kTiles columns (gate and up in turn), as wgmma leaves them,
// become rows of silu(gate) * up. sum(4 t + r) is the lane's: row lane / 4 + 8 (r / 2), column 8 t + 2 (lane % 4) + r
// % 2. `out` is the matrix, row0 this lane's first row, column0 the warp's first inner column (a multiple of 4).
template <class Element, int kTiles, class Sums>
MXC_DEVICE void storeGated(const Sums& sum, uint16_t* out, int64_t stride, int row0, int rows, int column0,
                           int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 4) {
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 4 * (tile + i) + 2 * half;
                value[i] = swiglu(sum(at), sum(at + 1));
            }
            const uint2 four = transposeQuad<Element>(value, lane);
            const int column = column0 + 4 * (tile + lane % 4);
            if (row < rows && column < columns) *reinterpret_cast<uint2*>(out + row * stride + column) = four;
        }
    }
}

// `multiply(product, problem)` starts one grouped GEMM: fc1 ends in storeGated, fc2 gives fp32.
template <class Runner, class Multiply>
Status runMoeSm90Steps(const MoeArgs& args, Runner& runner, Multiply&& multiply) {
    const unsigned rows = static_cast<unsigned>(args.tokens * args.top_k);
    Status status = runner.template run<MoeGroupedArguments>(1, args);
    if (status == Status::kOk) status = runner.template run<MoeGatherRows>(rows, args);
    if (status == Status::kOk) status = multiply(0, groupedProblem(args.grouped, 0));
    if (status == Status::kOk) status = multiply(1, groupedProblem(args.grouped, 1));
    return status;
}

}  // namespace mxc
