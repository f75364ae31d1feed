// Compiled in front of every test program (g++ -include): device code of csrc finds CUDA's names, and what is inline
// PTX in csrc/core/X.cuh comes from its twin tests/simt/core/X.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "simt/buffer.h"
#include "simt/builtins.h"
#include "simt/machine.h"
#include "simt/program.h"
