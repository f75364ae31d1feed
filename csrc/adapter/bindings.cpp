#include <pybind11/pybind11.h>

#include "adapter/forward_sm90_config.h"
#include "adapter/params.h"
#include "core/bind_launch.h"

namespace peft_kernels::adapter {

void bind(pybind11::module_ module) {
  module.doc() =
      "Kernels of bottleneck adapters, as adapter/params.h describes them; the current device must be that of the "
      "tensors.";
  module.attr("MAX_RANK") = kMaxRank;
  module.def("max_columns", &max_columns, pybind11::arg("r"),
             "The largest K and N at this width that a cluster can hold.");
  bind_launch(module, "forward", forward_sm90,
              "Write z (M, r) float32 and y (M, N) on an sm_90 device; strides are of rows, in elements.");
}

}  // namespace peft_kernels::adapter
