// How a family's bindings get into the module without module.cpp naming the family.
#pragma once

#include <pybind11/pybind11.h>

namespace peft_kernels {

// A family's bindings.cpp holds one static Registrar; module.cpp gives each a submodule of the family's name.
// The list is chained through the objects, so it is complete however static initialisation orders the files.
class Registrar {
 public:
  using Bind = void (*)(pybind11::module_& family);

  Registrar(const char* family, Bind bind) : family_(family), bind_(bind), next_(head()) { head() = this; }

  static void bind_all(pybind11::module_& module) {
    for (const Registrar* entry = head(); entry != nullptr; entry = entry->next_) {
      pybind11::module_ submodule = module.def_submodule(entry->family_);
      entry->bind_(submodule);
    }
  }

 private:
  static const Registrar*& head() {
    static const Registrar* first = nullptr;
    return first;
  }

  const char* family_;
  Bind bind_;
  const Registrar* next_;
};

}  // namespace peft_kernels
