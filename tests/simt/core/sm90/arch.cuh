// Twin of csrc/core/sm90/arch.cuh.
#pragma once

#define PEFT_KERNELS_SM90A 1
#define PEFT_KERNELS_DEVICE inline
