// What CuTe (the headers of NVIDIA's CUTLASS) says about the hardware's layouts, as tables; evaluated on the host.
// Built by tests/plugins/test_cute_layouts.py, which compares them with the kernels' own code in the emulator.
#include <cstdint>

// CuTe takes shared addresses through this intrinsic; here they are offsets from `origin`.
namespace {
alignas(1024) char origin[1 << 18];
inline uint64_t __cvta_generic_to_shared(const void* pointer) {
    return static_cast<uint64_t>(static_cast<const char*>(pointer) - origin);
}
}  // namespace
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1

#include <cuda.h>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "lightning/row_map.h"

using cute::_;
using Element = cute::bfloat16_t;
using Major = cute::SM90::GMMA::Major;

namespace {

struct MapArguments {  // of cuTensorMapEncodeTiled
    uint32_t type, rank, interleave, swizzle, fill;
    uint64_t address, size[5], stride[4];
    uint32_t box[5], step[5];
};
MapArguments last_map;

CUresult recordMap(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
                   const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                   CUtensorMapFloatOOBfill fill) {
    last_map = {type, rank, interleave, swizzle, fill, reinterpret_cast<uint64_t>(address), {}, {}, {}, {}};
    for (cuuint32_t i = 0; i < rank; ++i) {
        last_map.size[i] = size[i];
        last_map.box[i] = box[i];
        last_map.step[i] = step[i];
        if (i + 1 < rank) last_map.stride[i] = stride[i];
    }
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                           const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                           const cuuint32_t* step, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                           CUtensorMapFloatOOBfill fill) {
    return recordMap(map, type, rank, address, size, stride, box, step, interleave, swizzle, promotion, fill);
}
// Not called; CUTLASS names it.
extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                            const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t,
                                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

namespace {

// Operands [M or N, K] with the 128-byte swizzle: K along the rows, or M (N) along them, in tiles of 64 columns.
template <Major kMajor, int kSize, int kK>
auto operandLayout() {
    using namespace cute;
    if constexpr (kMajor == Major::K) {
        return tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kSize>, Int<kK>>{});
    } else {
        return tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<kSize>, Int<kK>>{}, Step<_2, _1>{});
    }
}

template <Major kMajor, int kSize, int kK>
void operand(uint32_t* address, uint64_t* descriptor) {
    using namespace cute;
    const auto tile =
        make_tensor(make_smem_ptr(reinterpret_cast<Element*>(origin)), operandLayout<kMajor, kSize, kK>());
    for (int i = 0; i < kSize; ++i) {
        for (int k = 0; k < kK; ++k) {
            const auto offset = reinterpret_cast<char*>(raw_pointer_cast(&tile(i, k))) - origin;
            address[i * kK + k] = static_cast<uint32_t>(offset);
        }
    }
    const auto steps = flat_divide(tile, Shape<Int<kSize>, _16>{});
    for (int step = 0; step < kK / 16; ++step) {
        descriptor[step] = SM90::GMMA::make_gmma_desc<kMajor>(steps(_, _, 0, step)).desc_;
    }
}

// element[thread][value] of a layout (thread, value) -> row + rows * column, as row * columns + column.
template <class Layout>
void fragment(const Layout& layout, int rows, int columns, int32_t* element) {
    const int threads = cute::size<0>(layout), values = cute::size<1>(layout);
    for (int t = 0; t < threads; ++t) {
        for (int v = 0; v < values; ++v) {
            const int index = layout(t, v);
            element[t * values + v] = index % rows * columns + index / rows;
        }
    }
}

// For each lane's 8 16-bit elements where they lie: 8 * (lane that names the row) + column.
template <class Traits>
void matrix(int32_t* element) {
    typename Traits::SrcLayout rows;
    typename Traits::DstLayout registers;
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) {
            for (int from = 0; from < 256; ++from) {
                if (rows(from / 8, from % 8 * 16) == registers(lane, i * 16)) element[lane * 8 + i] = from;
            }
        }
    }
}

}  // namespace

extern "C" {

// 0: 64 x 128, K along rows; 1: 64 x 64, K along rows; 2: 64 x 64, K the rows; 3: 128 x 64, K the rows.
void cute_operand(int form, uint32_t* address, uint64_t* descriptor) {
    if (form == 0) operand<Major::K, 64, 128>(address, descriptor);
    if (form == 1) operand<Major::K, 64, 64>(address, descriptor);
    if (form == 2) operand<Major::MN, 64, 64>(address, descriptor);
    if (form == 3) operand<Major::MN, 128, 64>(address, descriptor);
}
// The instruction's immediates for K along the rows, and for K the rows.
void cute_transposed(int32_t* two) {
    two[0] = static_cast<int32_t>(Major::K);
    two[1] = static_cast<int32_t>(Major::MN);
}

void cute_accumulator(int columns, int32_t* element) {
    using namespace cute;
    if (columns == 64) {
        using Op = SM90_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
        fragment(typename MMA_Traits<Op>::CLayout{}, 64, 64, element);
    } else {
        using Op = SM90_64x128x16_F32BF16BF16_SS<Major::MN, Major::MN>;
        fragment(typename MMA_Traits<Op>::CLayout{}, 64, 128, element);
    }
}
void cute_register_a(int32_t* element) {
    using Op = cute::SM90_64x64x16_F32BF16BF16_RS<Major::K, Major::K>;
    fragment(typename cute::MMA_Traits<Op>::ALayout{}, 64, 16, element);
}

// Row and column in a tile of 128 x 256 of each sum of the experts' products (CUTLASS' cooperative kernel: two
// warpgroups below each other): [256][128][2].
void cute_expert_tile(int32_t* at) {
    using namespace cute;
    const auto mma = make_tiled_mma(SM90_64x256x16_F32BF16BF16_SS<Major::K, Major::K>{}, Layout<Shape<_2, _1, _1>>{});
    const auto tile = make_identity_tensor(Shape<_128, _256>{});
    for (int thread = 0; thread < 256; ++thread) {
        const auto part = mma.get_thread_slice(thread).partition_C(tile);
        for (int i = 0; i < 128; ++i) {
            at[(thread * 128 + i) * 2] = get<0>(part(i));
            at[(thread * 128 + i) * 2 + 1] = get<1>(part(i));
        }
    }
}

// mma.sync: operand 0 A [16, 16], 1 B [8, 16], 2 C [16, 8].
void cute_mma(int operand, int32_t* element) {
    using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    if (operand == 0) fragment(typename Traits::ALayout{}, 16, 16, element);
    if (operand == 1) fragment(typename Traits::BLayout{}, 8, 16, element);
    if (operand == 2) fragment(typename Traits::CLayout{}, 16, 8, element);
}

void cute_load_matrix(int transposed, int32_t* element) {
    if (transposed) {
        matrix<cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>>(element);
    } else {
        matrix<cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>>(element);
    }
}
// stmatrix goes the other way: the registers are its source.
void cute_store_matrix(int transposed, int32_t* element) {
    struct Plain {
        using SrcLayout = cute::Copy_Traits<cute::SM90_U32x4_STSM_N>::DstLayout;
        using DstLayout = cute::Copy_Traits<cute::SM90_U32x4_STSM_N>::SrcLayout;
    };
    struct Transposed {
        using SrcLayout = cute::Copy_Traits<cute::SM90_U16x8_STSM_T>::DstLayout;
        using DstLayout = cute::Copy_Traits<cute::SM90_U16x8_STSM_T>::SrcLayout;
    };
    if (transposed) {
        matrix<Transposed>(element);
    } else {
        matrix<Plain>(element);
    }
}

// The map CuTe asks the driver for, for tiles of 64 tokens x 64 columns of [batch, tokens, heads, 128] (shared by the
// `ctas` of a cluster) ...
void cute_map(int batch, int tokens, int heads, int ctas, void* rows, MapArguments* out) {
    using namespace cute;
    const auto shape = make_shape(tokens, Int<128>{}, heads, batch);
    const auto stride = make_stride(int64_t{128} * heads, _1{}, int64_t{128}, int64_t{128} * heads * tokens);
    const auto tensor = make_tensor(make_gmem_ptr(static_cast<Element*>(rows)), make_layout(shape, stride));
    const auto tile = operandLayout<Major::K, 64, 64>();
    if (ctas == 2) {
        make_tma_copy(SM90_TMA_LOAD_MULTICAST{}, tensor, tile, Shape<_64, _64>{}, Int<2>{});
    } else {
        make_tma_copy(SM90_TMA_LOAD{}, tensor, tile, Shape<_64, _64>{}, Int<1>{});
    }
    *out = last_map;
}
// ... and ours.
void our_map(int batch, int tokens, int heads, int box_tokens, void* rows, MapArguments* out) {
    mxc::LightningParams params;
    params.batch = batch;
    params.tokens = tokens;
    params.heads = heads;
    params.head_dim = 128;
    params.dtype = mxc::DType::kBFloat16;
    CUtensorMap map;
    mxc::encodeRowMap(recordMap, map, static_cast<const uint16_t*>(rows), params, box_tokens);
    *out = last_map;
}
size_t map_bytes() { return sizeof(MapArguments); }
}
