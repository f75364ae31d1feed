#include <pybind11/pybind11.h>

#include <string>

#include "core/bind_launch.h"
#include "lora/gemm_sm90_config.h"
#include "lora/gemm_sm90_shape.h"
#include "lora/params.h"
#include "lora/reduce_params.h"

namespace py = pybind11;

namespace peft_kernels::lora {
namespace {

// The workspace begins with the flags; the partial sums follow.
py::tuple decode_workspace(const py::kwargs& given) {
  const auto shape = params_of<decode::Shape>("decode_workspace", given);
  return py::make_tuple(decode::flag_count(shape), decode::workspace_bytes(shape));
}

// The workspace begins with the flags; S in half precision follows.
py::tuple gemm_workspace(int64_t m, int64_t r) {
  return py::make_tuple(gemm_flags(m), gemm_workspace_bytes(m, r));
}

// The workspace begins with the tickets; the partial sums follow.
py::tuple reduce_workspace(int64_t m, int64_t n, int64_t k, int64_t r, bool exact, bool narrow, int multiprocessors) {
  const auto variant = reduce::variant_for(r, exact, narrow);
  const auto plan = reduce::plan_for(m, n, k, r, variant, multiprocessors);
  return py::make_tuple(reduce::ticket_count(plan), reduce::workspace_bytes(plan, variant));
}

// Columns of a tile, blocks of a cluster, and the part of the multiprocessors' time that tiles fill.
py::tuple gemm_tiles(
    int64_t m, int64_t n, int64_t k, int64_t r, Dtype dtype, bool backward, bool dropout, int multiprocessors) {
  const auto type = dtype == Dtype::kBfloat16 ? HalfType::kBf16 : HalfType::kFp16;
  const auto direction = backward ? Direction::kBackward : Direction::kForward;
  const int wide = gemm_wide(gemm_padded_rank(r), gemm_folds(type, direction, dropout), dropout);
  const GemmShape shape = gemm_shape(m, n, k, wide, gemm_narrow(wide, dropout), multiprocessors);
  return py::make_tuple(shape.block_n, shape.cluster, gemm_busy(m, n, shape, multiprocessors));
}

}  // namespace

void bind(py::module_& module) {
  module.attr("GEMM_MAX_RANK") = kGemmMaxRank;
  module.def("decode_workspace", &decode_workspace,
             "Flags and bytes of the workspace of decode_forward, decode_rows and decode_four_bit, which begins with "
             "the flags, "
             "8 bytes each.");
  module.def("gemm_workspace", &gemm_workspace, py::kw_only(), py::arg("m"), py::arg("r"),
             "Flags and bytes of gemm_sm90's workspace, which begins with the flags, 8 bytes each.");
  module.def("reduce_workspace", &reduce_workspace, py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("r"), py::arg("exact"), py::arg("narrow"), py::arg("multiprocessors"),
             "Tickets and bytes of reduce_rows's workspace, which begins with the tickets, 8 bytes each. n or k is 0 "
             "where dY or x is not given; exact: float32 adapters; narrow: dS is asked for.");
  module.def(
      "gemm_tiles",
      [](int64_t m, int64_t n, int64_t k, int64_t r, const std::string& dtype, bool backward, bool dropout,
         int multiprocessors) {
        return gemm_tiles(m, n, k, r, value_of<Dtype>(dtype, "dtype"), backward, dropout, multiprocessors);
      },
      py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"), py::arg("dtype"), py::arg("backward"),
      py::arg("dropout"), py::arg("multiprocessors"),
      "Columns of a tile of gemm_sm90's y, blocks of a cluster, and the part of the multiprocessors' time they fill.");
  bind_launch(module, "dropout_mask", dropout_mask,
              "Write the keep-mask (rows, cols), one byte an element, of the 0-d int64 seed.");
  bind_launch(module, "decode_forward", decode_forward,
              "Write y (m, n) and S (m, r) of at most 16 tokens. scale: address of a float32 or None, and a number.");
  bind_launch(module, "decode_rows", decode_rows,
              "Write y (m, n) and S (m, width) of at most 16 tokens, each with the adapter of its slot, as "
              "DecodeRowsParams says.");
  bind_launch(
      module, "decode_four_bit", decode_four_bit,
      "Write y (m, n) and S (m, r) of at most 16 tokens on a weight of four bits, as DecodeFourBitParams says.");
  bind_launch(module, "gemm_sm90", gemm_sm90,
              "Write y (m, n) and S (m, r) as GemmParams says. scale: address of a float32 or None, and a number.");
  bind_launch(module, "reduce_rows", reduce_rows,
              "Write dA (r, k), dB (n, r), dbias (n,) and parts of dS (tiles of n, m, r), those that are not None, as "
              "ReduceParams says.");
}

}  // namespace peft_kernels::lora
