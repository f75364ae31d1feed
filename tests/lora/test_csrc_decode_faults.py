"""Faults that are put into the decode kernel on purpose, each seen by the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.lora import simt_decode
from tests.lora.cases import Case, make, make_exact, run_oracle
from tests.simt import build, faults
from tests.simt.faults import Fault

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

CPU = torch.device("cpu")
PLAIN, WIDE = "__nv_bfloat16, __nv_bfloat16", "__nv_bfloat16, float"
FEW, MANY = 5, 13  # tokens, for which there is a kernel each
# Two tiles of A and of W, splits of each, a last chunk that is cut off, and more units than blocks.
SPLITS, GRID = (3, 4), 5
FAULTS = {
    "no fault": Fault("", "", PLAIN),
    "no fault, float32": Fault("", "", WIDE),
    "a float32 row has two pieces, few tokens": Fault(
        "for (int i = 2; i >= 0; --i) {  // small ones first\n          const uint32_t a[4]",
        "for (int i = 1; i >= 0; --i) {\n          const uint32_t a[4]",
        WIDE,
    ),
    "a float32 row has two pieces, many tokens": Fault(
        "for (int i = 2; i >= 0; --i) {\n          const uint32_t b[2]",
        "for (int i = 1; i >= 0; --i) {\n          const uint32_t b[2]",
        WIDE,
    ),
    "a float32 row's third piece is cut": Fault("for (int i = 0; i < 3; ++i) {", "for (int i = 0; i < 2; ++i) {", WIDE),
    "an infinite element has a rest": Fault("rest == rest ? rest : 0.0f", "rest", WIDE),
    "S goes to the next rank": Fault(
        "* params.shape.r + rank] = sums[j]", "* params.shape.r + (rank + 1) % params.shape.r] = sums[j]", PLAIN
    ),
    "a range loses its last chunk": Fault(
        "* (unit.split + 1) / unit.splits)}", "* (unit.split + 1) / unit.splits) - 1}", PLAIN
    ),
    "the end of k is left out": Fault(
        "at_most(params.shape.k, range.end * kChunkK)", "range.end * kChunkK - kChunkK", PLAIN
    ),
    "earlier splits are not waited for": Fault("  wait_for(params, index - unit.split, 1, unit.split);\n", "", PLAIN),
    "S is not waited for": Fault(
        "  wait_for(params, unit_of_s(shape, 0), shape.down_splits, tiles(shape.r));\n", "", PLAIN
    ),
    "one tile of S is waited for": Fault("shape.down_splits, tiles(shape.r));", "shape.down_splits, 1);", PLAIN),
    "a unit is published before all have written": Fault(
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    publish(", "  if (threadIdx.x == 0) {\n    publish(", PLAIN
    ),
    "splits are added in another order on each block": Fault(
        "gPartial[split * size", "gPartial[(split + blockIdx.x) % unit.split * size", PLAIN
    ),
    "the first split is not added": Fault(
        "for (int split = 0; split < unit.split", "for (int split = 1; split < unit.split", PLAIN
    ),
    "warps' sums are read before all have left theirs": Fault(
        "  __syncthreads();\n#pragma unroll\n  for (int j = 0; j < kOutputs<kTokens>; ++j) {\n    sums[j] = 0.0f;",
        "#pragma unroll\n  for (int j = 0; j < kOutputs<kTokens>; ++j) {\n    sums[j] = 0.0f;",
        PLAIN,
    ),
    "B's next ranks come while others read the ones before": Fault(
        "      __syncthreads();  // all have read the block before\n", "", PLAIN
    ),
    "S is multiplied before all of it has come": Fault(
        "    stage_s(sS, thread, params, rank);\n    __syncthreads();\n",
        "    stage_s(sS, thread, params, rank);\n",
        PLAIN,
    ),
    "ranks past the first block are left out": Fault(
        "rank < shape.r; rank += kRankBlock", "rank < 1; rank += kRankBlock", PLAIN
    ),
}


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel."""
    return build.build(faults.source("lora/decode.cuh", simt_decode.TEST, FAULTS))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    version = faulty, list(FAULTS).index(fault)
    adapter = torch.float32 if FAULTS[fault].config == WIDE else None

    def exact(m: int, schedules: int) -> None:
        case = Case(m=m, n=70, k=1096, r=100, dtype=torch.bfloat16, adapter_dtype=adapter, scale=0.5)
        tensors, dy = make_exact(case, CPU)
        y, s = simt_decode.run(case, tensors, *SPLITS, GRID, schedules, faulty=version)
        assert torch.equal(y.double(), run_oracle(case, tensors, dy).y)
        assert torch.equal(s.double(), tensors.x.double() @ tensors.lora_a.double().t())

    def same_bits() -> None:
        case = Case(m=FEW, n=70, k=1096, r=100, dtype=torch.bfloat16, adapter_dtype=adapter)
        tensors = make(case, CPU)
        results = [simt_decode.run(case, tensors, *SPLITS, grid, faulty=version) for grid in (GRID, GRID + 1)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)

    def whole_columns(m: int) -> None:
        """A token that is 1 in one place takes A's column there."""
        case = Case(m=m, n=8, k=64, r=70, dtype=torch.bfloat16, adapter_dtype=adapter, bias=False)
        tensors = make(case, CPU)
        tensors.lora_a[3, 1] = torch.inf
        _, s = simt_decode.run(case, tensors._replace(x=torch.eye(m, case.k, dtype=case.dtype)), faulty=version)
        for token in range(m):
            rows = torch.arange(case.r) != 3  # where an infinite element makes nan of what is multiplied by 0
            assert torch.equal(s[token, rows], tensors.lora_a[rows, token])
        assert s[1, 3] == torch.inf

    def check() -> None:
        if adapter is not None:
            whole_columns(FEW)
            whole_columns(MANY)
        for m in (FEW, MANY):
            exact(m, 1)
        same_bits()
        exact(FEW, 12)

    if fault.startswith("no fault"):
        check()
        return
    with pytest.raises(AssertionError):
        check()
