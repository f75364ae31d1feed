// Fills a kernel's own list of fields, so that a program names none of them twice.
#pragma once

#include <map>
#include <string>
#include <type_traits>

#include "core/names.h"
#include "simt/program.h"

namespace simt {

// Pointers from the buffers; what follows a pointer is numbered after its name.
struct Take {
  const Arguments& arguments;
  std::map<std::string, void*> memory;

  template <typename T, typename... Rest>
  void operator()(const std::string& name, T& member, Rest&... rest) {
    if constexpr (std::is_pointer_v<T>) {
      member = static_cast<T>(memory.at(name));
    } else if constexpr (std::is_enum_v<T>) {
      member = peft_kernels::value_of<T>(arguments.text(name), name);
    } else if constexpr (std::is_integral_v<T>) {
      member = static_cast<T>(arguments.integer(name));
    } else {
      member = static_cast<T>(arguments.number(name));
    }
    [[maybe_unused]] int i = 0;
    ((rest = static_cast<Rest>(arguments.number(name + "_" + std::to_string(i++)))), ...);
  }
};

}  // namespace simt
