// sm_90's copy engine (bulk tensor copies that complete on an mbarrier), thread block clusters and register
// reallocation. On the host the emulator (tests/plugins/emulator/mxc_emulator_tma.h) supplies the same functions.
#pragma once

#include "mxc/hopper.cuh"

#if defined(__CUDACC__)

namespace mxc {

// What the driver's cuTensorMapEncodeTiled makes; passed by value in a kernel's arguments.
struct alignas(128) TensorMap {
    char opaque[128];
};

// Starts the copy of the map's box at coordinates (c0 fastest) into shared memory; its bytes are counted by `barrier`.
MXC_DEVICE void copyBox(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// The same into the CTAs of the cluster that `ranks` (bits) names, at the same offsets and counted by their barriers.
MXC_DEVICE void copyBoxMulticast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t ranks, int c0, int c1,
                                 int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
        "l"(&map), "r"(barrier), "h"(ranks), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Starts the store of a box from shared memory; what lies outside the tensor is not written.
MXC_DEVICE void storeBox(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
MXC_DEVICE void storeBoxCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's committed stores have read their shared memory.
MXC_DEVICE void storeBoxWaitRead() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// The barrier's current phase also waits for so many copied bytes. Not an arrival.
MXC_DEVICE void barrierExpect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier that lies at the same offset in CTA `rank` of the cluster.
MXC_DEVICE void barrierArriveAt(uint32_t barrier, int rank) {
    asm volatile(
        "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, "
        "[remote];}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
// Waits for all threads of the cluster.
MXC_DEVICE void syncCluster() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// The same number for all lanes, and known to the compiler as such.
MXC_DEVICE int warpUniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Registers of this warpgroup's threads from here on (a multiple of 8); all its warps call it.
template <int kCount>
MXC_DEVICE void giveRegistersBack() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MXC_DEVICE void takeRegisters() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace mxc

#else
#include "mxc_emulator_tma.h"
#endif
