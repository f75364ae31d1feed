"""The host side of TMA against a driver and a runtime of this file: what a thread without a context gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.simt import build

pytestmark = pytest.mark.cpu_only

# The driver encodes for a thread that has a current context, and counts who was given one. As in CUDA, cudaGetDevice
# names a device without binding anything.
PROGRAM = r"""
#include <thread>

#include "core/sm90/tensor_map.h"

thread_local int current_device = 0;
thread_local int bound_context = -1;
thread_local int calls = 0;
int encoded_in = -1;

extern "C" {
CUresult fake_encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                     const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  encoded_in = bound_context;
  return bound_context < 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}
cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  ++calls;
  current_device = bound_context = device;
  return cudaSuccess;
}
cudaError_t entry_point(void** function, cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&fake_encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  return entry_point(function, found);
}
#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char*, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
  return entry_point(function, found);
}
#endif
cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "text"; }
}

using namespace peft_kernels;

int main() {
  static uint16_t data[64 * 64];
  const auto encode = [] { sm90::encode(sm90::HalfType::kBf16, {data, 64, 64, 64, 64, 64}); };
  const auto expect = [](bool holds, int status) { if (!holds) std::exit(status); };
  const auto encodes_alone = [&](int device) {
    std::thread([&] {
      current_device = device;
      encode();
      expect(encoded_in == device, 2);
      encode();
      expect(calls == 1, 3);  // once a thread
    }).join();
  };
  encodes_alone(0);
  encodes_alone(0);  // a new thread, though one before had a context
  encodes_alone(1);
  std::thread([&] {
    encode();
    current_device = 1;  // as a runtime from before CUDA 12 chooses one
    encode();
    expect(encoded_in == 1, 4);
  }).join();
  return 0;
}
"""


def test_a_new_thread_encodes_in_its_device_s_context(tmp_path: Path) -> None:
    """As autograd's threads, and those of a server: the first CUDA call of a thread may be this one."""
    cxx, *includes = build.host_compiler()
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    command = [cxx, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{build.ROOT / 'csrc'}"]
    command += [*includes, str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-6000:]
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, f"exit status {ran.returncode}: {ran.stderr}"
