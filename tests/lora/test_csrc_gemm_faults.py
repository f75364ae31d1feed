"""Faults that are put into the Hopper GEMM on purpose, each seen by the emulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.lora import cases, simt_gemm
from tests.lora.cases import Case
from tests.simt import build, faults
from tests.simt.faults import Fault

CPU = torch.device("cpu")
BF16 = torch.bfloat16

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

# Faults: the text that is replaced, what replaces it, and which kernel must see it. In one program, each in a namespace
# of its own, because compiling one more costs a second and compiling another program five.
PLAIN, BACKWARD_CONFIG = "kBf16-16-kForward", "kBf16-16-kBackward"
ONE_CLUSTER = "kBf16-16-kForward-1"  # which has more than one unit n = 0
DROPPED, BACKWARD_DROPPED = f"{PLAIN}-dropout", f"{BACKWARD_CONFIG}-dropout"
FAULTS = {
    "no fault": ("", "", PLAIN),
    "no fault, backward": ("", "", BACKWARD_CONFIG),
    "no fault, dropout": ("", "", DROPPED),
    "no fault, dropout, backward": ("", "", BACKWARD_DROPPED),
    "consumers do not wait for a stage's copies": (
        "    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);\n    sm90::wgmma_fence();",
        "    sm90::wgmma_fence();",
        PLAIN,
    ),
    "the producer does not wait for a free stage": (
        "sm90::barrier_wait(&shared.free[ring.slot], ring.parity ^ 1);",
        "",
        PLAIN,
    ),
    "the producer waits for the wrong parity": ("ring.parity ^ 1", "ring.parity", PLAIN),
    "a stage is freed before its products are done": (
        "    if (step > 0) {\n      sm90::wgmma_wait<1>();\n      free_stage(shared, previous, cluster);\n    }\n",
        "    if (step > 0) {\n      free_stage(shared, previous, cluster);\n      sm90::wgmma_wait<1>();\n    }\n",
        PLAIN,
    ),
    "the last stage is freed before its products are done": (
        "  sm90::wgmma_wait<0>();\n  sm90::wgmma_results(rY);\n  if constexpr (kMakesS) {",
        "  free_stage(shared, previous, cluster); sm90::wgmma_wait<0>(); return;\n  if constexpr (kMakesS) {",
        PLAIN,
    ),
    "a rank step does not wait for its copies": (
        "      sm90::barrier_wait(&shared.full[ring.slot], ring.parity);\n      sm90::wgmma_fence();",
        "      sm90::wgmma_fence();",
        PLAIN,
    ),
    "the rank steps' stages are freed before the rank product": (
        "  sm90::wgmma_commit();\n  sm90::wgmma_wait<0>();\n  sm90::wgmma_results(rY);\n  free_rank_steps(",
        "  sm90::wgmma_commit();\n  free_rank_steps(shared, slots, cluster);\n  sm90::wgmma_wait<0>();\n"
        "  sm90::wgmma_results(rY);\n  if (false) free_rank_steps(",
        PLAIN,
    ),
    "S is not waited for": (
        "wait_until_published(&arguments.flags[Config::kConsumers * tile.m + consumer], arguments.nonce);",
        "",
        PLAIN,
    ),
    "one half of S is not waited for": (
        "for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {\n        wait",
        "for (int consumer = 0; consumer < 1; ++consumer) {\n        wait",
        PLAIN,
    ),
    "S is published by a thread that does not wait for the others": (
        "  sm90::fence_async_shared();\n  sm90::named_barrier_sync(kConsumerBarrier + consumer, Config::kWarpgroup);\n"
        "  if (threadIdx.x % Config::kWarpgroup == 0) {\n    publish",
        "  sm90::fence_async_shared();\n  if (threadIdx.x % Config::kWarpgroup == 0) {\n    publish",
        PLAIN,
    ),
    "flags of an earlier launch count": ("arguments.nonce = params.nonce;", "arguments.nonce = 1;", PLAIN),
    "S is not fenced for TMA": (
        "  sm90::fence_async_global();\n  sm90::fence_async_shared();",
        "  sm90::fence_async_shared();",
        PLAIN,
    ),
    "S is not fenced for the tensor cores": (
        "  sm90::fence_async_global();\n  sm90::fence_async_shared();",
        "  sm90::fence_async_global();",
        PLAIN,
    ),
    "S is kept without the swizzle": (
        "sm90::swizzled(sS + tile_row * kLine + 2 * (col % Config::kRankChunk), kLine)",
        "sS + tile_row * kLine + 2 * (col % Config::kRankChunk)",
        PLAIN,
    ),
    "y is staged without the swizzle": (
        "sm90::swizzled(sY + 16 * (i / 4 + lane / 16), Config::kLineBytes)",
        "(sY + 16 * (i / 4 + lane / 16))",
        PLAIN,
    ),
    "y is staged while the last chunk but one is still read": (
        "    sm90::tma_store_wait_read<Config::kBuffers - 1>();\n",
        "",
        PLAIN,
    ),
    "one more buffer of y is taken to be free": (
        "tma_store_wait_read<Config::kBuffers - 1>",
        "tma_store_wait_read<Config::kBuffers>",
        PLAIN,
    ),
    "down comes while y is still read": (
        "      sm90::barrier_wait(&shared.drained, drained_parity);\n",
        "",
        ONE_CLUSTER,
    ),
    "y is said to have left before it has": (
        "        sm90::tma_store_wait_read<0>();\n        sm90::barrier_arrive(&shared.drained);",
        "        sm90::barrier_arrive(&shared.drained);",
        ONE_CLUSTER,
    ),
    "y is staged where the other consumer still multiplies by down": (
        "      sm90::named_barrier_sync(kBothConsumersBarrier, Config::kConsumers * Config::kWarpgroup);\n",
        "",
        PLAIN,
    ),
    "y is not fenced for TMA": (
        "  sm90::fence_async_shared();\n  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        "  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        PLAIN,
    ),
    "y leaves before the warp has staged it": (
        "  sm90::fence_async_shared();\n  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        "  sm90::fence_async_shared();\n  if (lane == 0) {\n    sm90::tma_store(",
        PLAIN,
    ),
    "the block exits before its stores are done": ("    sm90::tma_store_wait<0>();\n", "", PLAIN),
    "fewer bytes are announced than come": ("(makes_s ? Config::kDownBytes : 0)", "0", PLAIN),
    "columns past the rank are not cleared": ("col < arguments.r ? rS[i] : 0.0f", "rS[i]", PLAIN),
    "rows past the end are written": (
        "      if (row < arguments.m) {\n        if (col",
        "      {\n        if (col",
        PLAIN,
    ),
    "the tile n = 0 comes last": (
        "  const TileIndex unit = arguments.order.at(number);",
        "  TileIndex unit = arguments.order.at(number); unit.n = arguments.order.tiles_n - 1 - unit.n;",
        PLAIN,
    ),
    "a producer does not wait for the other block's consumers": (
        "sm90::barrier_hand_back(&shared.free[slot], threadIdx.x % 32);",
        "sm90::barrier_hand_back(&shared.free[slot], sm90::cluster_rank());",
        PLAIN,
    ),
    "a block exits while the other still needs it": (
        "  __syncwarp();\n  sm90::cluster_sync();\n}",
        "}",
        PLAIN,
    ),
    "barriers are used before the other block has made them": (
        "  sm90::cluster_sync();\n\n  const int warpgroup",
        "  __syncthreads();\n\n  const int warpgroup",
        PLAIN,
    ),
    "both blocks copy the same half of W": (
        "cluster > 1 ? static_cast<int>(sm90::cluster_rank()) : 0",
        "0",
        PLAIN,
    ),
    "a half of W goes to one block alone": (
        "(1 << Config::kHalves) - 1",
        "1 << half",
        PLAIN,
    ),
    "both blocks take the same rows": (
        "unit.m * arguments.cluster + static_cast<int>(sm90::cluster_rank())",
        "unit.m * arguments.cluster",
        PLAIN,
    ),
    "the ghost has no flags": (
        "constexpr int64_t kRows = kGemmMaxCluster * kGemmBlockM;\n  return kGemmConsumers * kGemmMaxCluster",
        "constexpr int64_t kRows = kGemmBlockM;\n  return kGemmConsumers",
        PLAIN,
    ),
    "halves of W's blocks are taken to be blocks": (
        "destination + (block * Config::kHalves + half) * kHalf * kLine",
        "destination + (half * kBlocks + block) * kHalf * kLine",
        BACKWARD_CONFIG,
    ),
    "W's blocks of columns are taken to be closer together": (
        "kWBlock = Config::kTransposed ? Config::kBlockK * kLine : 16",
        "kWBlock = 1024",
        BACKWARD_CONFIG,
    ),
    "steps along k are as far in transposed operands": (
        "kAlongW = Config::kTransposed ? 16 * kLine : 32",
        "kAlongW = 32",
        BACKWARD_CONFIG,
    ),
    "x has the mask of the row below": ("row + 8 * (i % 2)", "row + 1 + 8 * (i % 2)", DROPPED),
    "the rank product has the mask of the row below": ("row + 8 * (i % 2)", "row + 1 + 8 * (i % 2)", BACKWARD_DROPPED),
    "both rows of a lane have the first's mask": ("row + 8 * (i % 2)", "row", DROPPED),
    "x has the mask of the next columns": ("lane_of_quad + i / 2 * 4", "lane_of_quad + 1 + i / 2 * 4", DROPPED),
    "the rank product has the mask of the first columns": (
        "tile.n * Config::kBlockN + chunk * Config::kChunkN)",
        "chunk * Config::kChunkN)",
        BACKWARD_DROPPED,
    ),
    "lanes keep the decisions on another's columns": (">> (2 * lane_of_quad)", "", DROPPED),
    "what is kept of x is not scaled up": ("Config::kDropout ? arguments.keep_scale : 1.0f", "1.0f", DROPPED),
    "what is kept of the rank product is not scaled up": (
        "Config::kDropout ? arguments.keep_scale : 1.0f",
        "1.0f",
        BACKWARD_DROPPED,
    ),
    "the base product is of dropped elements, too": (
        "rX[i][j] &= kept.pair(j % 2, 2 * i + j / 2);",
        "rX[i][j] &= kept.pair(j % 2, 2 * i + j / 2); sm90::store_shared(sm90::shared_address(sX) + sm90::swizzled("
        "(warp_row + lane / 4 + j % 2 * 8) * kLine + 32 * i + j / 2 * 16 + lane % 4 * 4, kLine), rX[i][j]);",
        DROPPED,
    ),
    "the base product is dropped, too": (
        "rY[at + j] + factor * rP[i + j]",
        "rP[i + j] == 0.0f ? 0.0f : rY[at + j] + factor * rP[i + j]",
        BACKWARD_DROPPED,
    ),
    "dS has elements dropped": (
        "col < arguments.r ? rS[i] : 0.0f",
        "col < arguments.r && keep(draw(*arguments.seed, row, 0), col % 8, arguments.threshold) ? rS[i] : 0.0f",
        BACKWARD_DROPPED,
    ),
    "x comes to registers without the swizzle": (
        "sX + sm90::swizzled((warp_row + lane % 16) * kLine + 32 * i + 16 * (lane / 16), kLine)",
        "sX + ((warp_row + lane % 16) * kLine + 32 * i + 16 * (lane / 16))",
        DROPPED,
    ),
    "a stage is freed before its products by down are done": (
        "      sm90::wgmma_wait<1>();\n      sm90::wgmma_operands(rX);\n      free_stage(",
        "      free_stage(shared, previous, arguments.cluster);\n      sm90::wgmma_wait<1>();\n"
        "      if (false) free_stage(",
        DROPPED,
    ),
}

FAULT_CASE = Case(m=300, n=520, k=200, r=3, dtype=BF16)  # two clusters high, with a ghost below the last row block
FAULT_CASE_BACKWARD = Case(m=200, n=200, k=520, r=3, dtype=BF16)


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel, by its number."""
    versions = {}
    for fault, (old, new, config) in FAULTS.items():
        kind, rank, direction = config.split("-")[:3]
        drops = str(config.endswith("dropout")).lower()
        types = f"sm90::HalfType::{kind}, {rank}, Direction::{direction}, 256, {drops}"
        versions[fault] = Fault(old, new, f"GemmConfig<{types}>")
    kept = ("lora/dropout.h", "lora/params.h")
    return build.build(faults.source("lora/gemm_sm90_arguments.h", simt_gemm.TEST, versions, kept))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    config = FAULTS[fault][2]
    backward, grid = config.startswith(BACKWARD_CONFIG), 1 if config == ONE_CLUSTER else 3
    case = FAULT_CASE_BACKWARD if backward else FAULT_CASE
    tensors, dy = simt_gemm.with_an_infinite_row(case), cases.output_gradient(case, CPU)
    if config.endswith("dropout"):
        # Eager torch makes nan of an infinite element that it drops.
        case = dataclasses.replace(case, p=0.3)
        tensors = cases.make(case, CPU)
    drop = simt_gemm.dropout_of(case)
    x, weight, lora_a, lora_b, bias = tensors

    def check(schedules: int) -> None:
        number = str(list(FAULTS).index(fault))
        if backward:
            operands, sizes = {"x": dy, "w": weight, "down": lora_b, "up": lora_a}, (case.m, case.k, case.n)
            got = simt_gemm.run(faulty, number, operands, None, case, sizes, grid=grid, schedules=schedules, drop=drop)
            simt_gemm.check_backward(case, tensors, dy, *got)
        else:
            operands, sizes = {"x": x, "w": weight, "down": lora_a, "up": lora_b}, (case.m, case.n, case.k)
            got = simt_gemm.run(faulty, number, operands, bias, case, sizes, grid=grid, schedules=schedules, drop=drop)
            simt_gemm.check_forward(case, tensors, *got)

    if fault.startswith("no fault"):
        check(4)
        return
    # What is wrong under every schedule is seen by one; a race by one of many.
    with pytest.raises(AssertionError):
        check(1)
        check(100)
