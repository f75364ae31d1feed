// Functions that a kernel and a host compiler alone can both compile: what a test without a GPU can run.
#pragma once

#ifdef __CUDACC__
#define PEFT_KERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PEFT_KERNELS_HOST_DEVICE inline
#endif
