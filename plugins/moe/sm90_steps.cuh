// What stands around the two grouped GEMMs of the sm_90a path: gathering the rows (TMA tiles cannot), the GEMMs'
// argument arrays (the rows of each expert are known on the device alone) and SwiGLU. Runs on any GPU and in the
// emulator.
#pragma once

#include "expert_tile.cuh"

#if defined(__CUDACC__)
#define MXC_MOE_HOST_DEVICE __host__ __device__ inline
#else
#define MXC_MOE_HOST_DEVICE inline
#endif

namespace mxc {

// The arrays of one grouped GEMM: for each local expert D[rows, n] = A[rows, k] B[n, k]^T, all row-major and packed.
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
            static_cast<const uint16_t*>(args.fc1) + expert * 2 * inner * hidden, args.gate_up + first * 2 * inner);
        set(args, 1, expert, {rows, args.hidden, args.inner}, args.inner_rows + first * inner,
            static_cast<const uint16_t*>(args.fc2) + expert * hidden * inner, args.out_rows + first * hidden);
    }

  private:
    static MXC_DEVICE void set(const Args& args, int product, int expert, GroupedProblem::Shape shape, const void* a,
                               const void* b, void* d) {
        const GroupedProblem problem = groupedProblem(args.grouped, product);
        problem.shapes[expert] = shape;
        problem.a[expert] = a;
        problem.b[expert] = b;
        problem.d[expert] = d;
        problem.stride_a[expert] = shape.k;
        problem.stride_b[expert] = shape.k;
        problem.stride_d[expert] = shape.n;
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

// inner_rows = silu(gate) * up. Grid: R.
template <class Element>
struct MoeSwiglu {
    using Args = MoeArgs;
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 4;
    static constexpr int kSharedBytes = 0;

    static MXC_DEVICE void run(const Args& args, char*) {
        const int row = static_cast<int>(blockIdx.x);
        if (row >= args.offsets[args.local_experts]) return;
        const uint16_t* from = args.gate_up + static_cast<int64_t>(row) * 2 * args.inner;
        uint16_t* to = args.inner_rows + static_cast<int64_t>(row) * args.inner;
        for (int column = static_cast<int>(threadIdx.x) * 8; column < args.inner; column += kThreads * 8) {
            const uint4 low = loadStreamed16(from + 2 * column), high = loadStreamed16(from + 2 * column + 8);
            *reinterpret_cast<uint4*>(to + column) =
                make_uint4(two(low.x, low.y), two(low.z, low.w), two(high.x, high.y), two(high.z, high.w));
        }
    }

  private:
    static MXC_DEVICE uint32_t two(uint32_t first, uint32_t second) {
        return pack<Element>(swiglu(unpackLow<Element>(first), unpackHigh<Element>(first)),
                             swiglu(unpackLow<Element>(second), unpackHigh<Element>(second)));
    }
};

// `multiply(product, problem)` starts one grouped GEMM: fc1 rounds to Element, fc2 gives fp32.
template <class Element, class Runner, class Multiply>
Status runMoeSm90Steps(const MoeArgs& args, Runner& runner, Multiply&& multiply) {
    const unsigned rows = static_cast<unsigned>(args.tokens * args.top_k);
    Status status = runner.template run<MoeGroupedArguments>(1, args);
    if (status == Status::kOk) status = runner.template run<MoeGatherRows>(rows, args);
    if (status == Status::kOk) status = multiply(0, groupedProblem(args.grouped, 0));
    if (status == Status::kOk) status = runner.template run<MoeSwiglu<Element>>(rows, args);
    if (status == Status::kOk) status = multiply(1, groupedProblem(args.grouped, 1));
    return status;
}

}  // namespace mxc
