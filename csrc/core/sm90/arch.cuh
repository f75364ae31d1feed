// What the code under core/sm90 needs to be compiled: a device pass for sm_90a. Elsewhere kernels compile to a trap,
// and their launchers refuse the device.
//
// tests/simt/core/sm90 holds a twin of each header here, with the same functions for the host: the tests compile the
// kernels against the twins. Kernels therefore hold no PTX and no CUDA intrinsics of their own.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PEFT_KERNELS_SM90A 1
#endif

#define PEFT_KERNELS_DEVICE __device__ __forceinline__
