// Enumerators by the names that Python has for them. Plain C++.
#pragma once

#include <stdexcept>
#include <string>

namespace peft_kernels {

template <typename Enum>
struct Named {
  Enum value;
  const char* name;
};
template <typename Enum>
Named(Enum, const char*) -> Named<Enum>;

// The enumerator of a name in names_of(Enum), which stands beside the enumeration. `what` is for the error.
template <typename Enum>
Enum value_of(const std::string& name, const std::string& what) {
  for (const Named<Enum>& entry : names_of(Enum{})) {
    if (name == entry.name) {
      return entry.value;
    }
  }
  std::string known;
  for (const Named<Enum>& entry : names_of(Enum{})) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument(what + " must be one of " + known + ", got " + name);
}

}  // namespace peft_kernels
