// The many-token path of compute capability 9.0: CUTLASS' grouped GEMM with TMA and wgmma (cooperative, 128 x 256 x 64,
// clusters of two neighbouring column tiles that share the token rows: an expert's odd row tile wastes nothing).
//
// fc1's epilogue applies SwiGLU to the fp32 sums: an interleaved gate and up are neighbours in one thread's registers.
#include <cstring>
#include <type_traits>

#include "moe_runner.cuh"
#include "sm90_steps.cuh"

#if __has_include(<cutlass/cutlass.h>)

// CUTLASS takes a minute to compile, so the passes for other architectures leave it out: for them the kernels, whose
// parameters are opaque for that reason, are empty.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MXC_MOE_CUTLASS 1
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#endif

namespace mxc {
namespace {

struct alignas(128) GemmParams {
    char bytes[2048];
};
constexpr int kGemmThreads = 384;  // a warpgroup that copies, two that multiply

#if defined(MXC_MOE_CUTLASS)

// In the place of CUTLASS' epilogue without shared memory (DefaultEpilogueArray, whose interface this is).
template <class Tile>
class SwigluEpilogue {
  public:
    using EpilogueSchedule = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized;
    using DispatchPolicy = EpilogueSchedule;
    using ElementOutput = cutlass::bfloat16_t;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementC = void;
    using ElementD = cutlass::bfloat16_t;
    using StrideC = cutlass::detail::TagToStrideC_t<cutlass::layout::RowMajor*>;
    using StrideD = StrideC;
    using InternalStrideC = cute::remove_pointer_t<StrideC>;
    using InternalStrideD = InternalStrideC;
    struct SharedStorage {};
    struct NoScaling {};  // what the other epilogue calls `thread`
    struct Arguments {
        NoScaling thread;
        const void** unused_c;
        StrideC unused_stride_c;
        ElementD** d;
        StrideD stride_d;
    };
    using Params = Arguments;

    template <class Shape>
    static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
        return arguments;
    }
    template <class Shape>
    static size_t get_workspace_size(const Shape&, const Arguments&, int) {
        return 0;
    }
    template <class Shape>
    static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }
    template <class Shape>
    static bool can_implement(const Shape&, const Arguments&) {
        return true;
    }

    CUTLASS_HOST_DEVICE explicit SwigluEpilogue(const Params& made) : params(made) {}
    CUTLASS_DEVICE bool is_source_needed() { return false; }

    template <class Shape, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
              class Residue>
    CUTLASS_DEVICE void operator()(Shape shape, BlockShape block, BlockCoord coord,
                                   const cute::Tensor<Engine, Layout>& sums, TiledMma mma, Residue, int thread, char*) {
        using namespace cute;
        constexpr int kTiles = size<1>(Tile{}) / 8;
        static_assert(decltype(size(sums))::value == 4 * kTiles, "a thread holds two rows of the tile");
        const auto [m, n, k, expert] = coord;
        const Tensor all = make_identity_tensor(make_shape(get<0>(shape), get<1>(shape)));
        const Tensor tile = local_tile(all, take<0, 2>(block), make_coord(m, n));
        const auto first = mma.get_thread_slice(thread).partition_C(tile)(0);  // row and column of sums(0)
        const int lane_column = thread % 4 * 2;
        storeGated<BFloat16, kTiles>([&](int i) { return sums(i); }, reinterpret_cast<uint16_t*>(params.d[expert]),
                                     get<0>(params.stride_d[expert]), get<0>(first), get<0>(shape),
                                     (get<1>(first) - lane_column) / 2, get<1>(shape) / 2);
    }

  private:
    Params params;
};

template <bool kFc1>
struct GroupedGemm {
    using Element = cutlass::bfloat16_t;
    using Out = std::conditional_t<kFc1, Element, float>;
    using Problem = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
    using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
    using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;

    using PlainEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, 16 / sizeof(Out), Out, Row*,
        16 / sizeof(Out), cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
        cutlass::epilogue::fusion::LinearCombination<Out, float, void>>::CollectiveOp;
    using GatedEpilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<SwigluEpilogue<Tile>>;
    using Epilogue = std::conditional_t<kFc1, GatedEpilogue, PlainEpilogue>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row*, 8, Element, Column*, 8, float, Tile,
        Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;

    using StrideA = typename Kernel::InternalStrideA;
    using StrideB = typename Kernel::InternalStrideB;
    using StrideD = typename Kernel::InternalStrideD;
    static_assert(sizeof(typename Problem::UnderlyingProblemShape) == sizeof(GroupedProblem::Shape),
                  "shapes are three int32");
    static_assert(sizeof(StrideA) == 8 && sizeof(StrideB) == 8 && sizeof(StrideD) == 8, "strides are one int64");
    static_assert(sizeof(typename Kernel::Params) <= sizeof(GemmParams) &&
                      alignof(typename Kernel::Params) <= alignof(GemmParams),
                  "the parameters fit");
    static_assert(Kernel::MaxThreadsPerBlock == kGemmThreads && Kernel::MinBlocksPerMultiprocessor == 1,
                  "see multiply kernels");

    // Fills in `params`; experts without rows have no tiles.
    static Status prepare(const GroupedProblem& problem, int experts, char* workspace, size_t workspace_bytes,
                          int sm_count, typename Kernel::Params& params) {
        cutlass::KernelHardwareInfo hardware;
        const cudaError_t error = cudaGetDevice(&hardware.device_id);
        if (error != cudaSuccess) return cudaFailure("moe", "asking the device", error);
        hardware.sm_count = sm_count;

        decltype(typename Kernel::Arguments{}.epilogue.thread) fusion;
        if constexpr (!kFc1) {
            fusion.alpha = 1.0f;
            fusion.beta = 0.0f;
        }
        const typename Kernel::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGrouped,
            {experts, reinterpret_cast<typename Problem::UnderlyingProblemShape*>(problem.shapes), nullptr},
            {reinterpret_cast<const Element**>(problem.a), reinterpret_cast<StrideA*>(problem.stride_a),
             reinterpret_cast<const Element**>(problem.b), reinterpret_cast<StrideB*>(problem.stride_b)},
            {fusion, nullptr, nullptr, reinterpret_cast<Out**>(problem.d),
             reinterpret_cast<StrideD*>(problem.stride_d)},
            hardware};
        const size_t needed = Kernel::get_workspace_size(arguments);
        if (needed > workspace_bytes) {
            return fail(Status::kWorkspace, "moe: the grouped GEMM needs %zu bytes, %zu are reserved", needed,
                        workspace_bytes);
        }
        if (!Kernel::can_implement(arguments))
            return fail(Status::kUnsupported, "moe: CUTLASS refuses the grouped GEMM");
        const cutlass::Status status =
            Kernel::initialize_workspace(arguments, workspace, nullptr);  // nothing to set: no kernels
        if (status != cutlass::Status::kSuccess) {
            return fail(Status::kCuda, "moe: the grouped GEMM: %s", cutlass::cutlassGetStatusString(status));
        }
        params = Kernel::to_underlying_arguments(arguments, workspace);
        return Status::kOk;
    }
};

#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MXC_MOE_MULTIPLY(fc1)                        \
    extern __shared__ __align__(1024) char shared[]; \
    using Kernel = GroupedGemm<fc1>::Kernel;         \
    Kernel{}(*reinterpret_cast<const Kernel::Params*>(params.bytes), shared)
#else
#define MXC_MOE_MULTIPLY(fc1) static_cast<void>(params)
#endif

__global__ void __launch_bounds__(kGemmThreads, 1) multiplyFc1(const __grid_constant__ GemmParams params) {
    MXC_MOE_MULTIPLY(true);
}
__global__ void __launch_bounds__(kGemmThreads, 1) multiplyFc2(const __grid_constant__ GemmParams params) {
    MXC_MOE_MULTIPLY(false);
}

#if defined(MXC_MOE_CUTLASS)

template <bool kFc1>
Status multiply(const MoeArgs& args, const GroupedProblem& problem, void (*kernel)(GemmParams), int sm_count,
                cudaStream_t stream) {
    using Kernel = typename GroupedGemm<kFc1>::Kernel;
    constexpr size_t kArrays = 2 * kGroupedProblemBytes;
    typename Kernel::Params made;
    const Status status =
        GroupedGemm<kFc1>::prepare(problem, args.local_experts, static_cast<char*>(args.grouped) + kArrays,
                                   args.grouped_bytes - kArrays, sm_count, made);
    if (status != Status::kOk) return status;
    GemmParams params;
    std::memcpy(params.bytes, &made, sizeof made);

    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error == cudaSuccess) {
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {cute::size<0>(typename GroupedGemm<kFc1>::Cluster{}),
                                  cute::size<1>(typename GroupedGemm<kFc1>::Cluster{}), 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = Kernel::get_grid_shape(made);
        config.blockDim = Kernel::get_block_shape();
        config.dynamicSmemBytes = Kernel::SharedStorageSize;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
        error = cudaLaunchKernelEx(&config, kernel, params);
    }
    if (error == cudaSuccess) return Status::kOk;
    cudaGetLastError();
    return cudaFailure("moe", "the grouped GEMM", error);
}

#else

template <bool kFc1>
Status multiply(const MoeArgs&, const GroupedProblem&, void (*)(GemmParams), int, cudaStream_t) {
    return Status::kArchitecture;  // host code of a device pass: thrown away
}

#endif

}  // namespace

Status runMoeSm90(const MoeArgs& args, int32_t sm_count, cudaStream_t stream) noexcept {
    CudaRunner runner{"moe", stream};
    return runMoeSm90Steps(args, runner, [&](int product, const GroupedProblem& problem) {
        return product == 0 ? multiply<true>(args, problem, multiplyFc1, sm_count, stream)
                            : multiply<false>(args, problem, multiplyFc2, sm_count, stream);
    });
}

}  // namespace mxc

#else

namespace mxc {

Status runMoeSm90(const MoeArgs&, int32_t, cudaStream_t) noexcept {
    return fail(Status::kArchitecture,
                "moe: this library was built without CUTLASS: it has no sm_90a kernels; unset MXC_MOE_SM90");
}

}  // namespace mxc

#endif
