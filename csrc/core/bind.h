// Functions of the module that fill a struct from keyword arguments. Beside the struct stands one list of them,
//
//   template <typename Take>
//   void fields(Take& take, Params& params) {
//     take("x", params.x, params.x_stride);
//
// A pointer comes as an integer, or None or 0 for null; an enumerator by its name; several members in one argument, as
// the address and strides of a tensor, by a tuple, or None for zeros. An argument that is missing, unknown or of a
// wrong type is a TypeError that names it, an enumerator that does not exist a ValueError. Free of CUDA.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "core/names.h"

namespace peft_kernels {

class Arguments {
 public:
  Arguments(const char* function, const pybind11::kwargs& given) : function_(function), given_(given) {
    taken_.reserve(given.size());
  }

  template <typename... Members>
  void operator()(const char* name, Members&... members) {
    const pybind11::handle value = PyDict_GetItemString(given_.ptr(), name);
    if (!value) {
      throw pybind11::type_error(function_ + ": the argument " + name + " is missing");
    }
    taken_.push_back(name);
    if constexpr (sizeof...(Members) == 1) {
      (convert(name, value, members), ...);
    } else if (!value.is_none()) {
      if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != sizeof...(Members)) {
        refuse(name, "a tuple of " + std::to_string(sizeof...(Members)) + " or None", value);
      }
      Py_ssize_t i = 0;
      (convert(name, PyTuple_GET_ITEM(value.ptr(), i++), members), ...);
    }
  }

  // Refuse the arguments that nobody has taken.
  void finish() const {
    if (taken_.size() == given_.size()) {
      return;
    }
    for (const auto& [key, value] : given_) {
      const std::string name = pybind11::str(key);
      if (std::find(taken_.begin(), taken_.end(), name) == taken_.end()) {
        throw pybind11::type_error(function_ + ": there is no argument " + name);
      }
    }
  }

 private:
  template <typename T>
  void convert(const char* name, pybind11::handle value, T& member) const {
    if constexpr (std::is_enum_v<T>) {
      member = value_of<T>(load<std::string>(name, "a name", value), name);
    } else if constexpr (std::is_pointer_v<T>) {
      member = value.is_none() ? nullptr : reinterpret_cast<T>(load<uintptr_t>(name, "an address or None", value));
    } else if constexpr (std::is_same_v<T, bool>) {
      member = load<T>(name, "a bool", value);
    } else if constexpr (std::is_floating_point_v<T>) {
      member = load<T>(name, "a number", value);
    } else {
      const char* signed_integer = sizeof(T) == 8 ? "an integer of 64 bits" : "an integer of 32 bits";
      member = load<T>(name, std::is_signed_v<T> ? signed_integer : "an unsigned integer", value);
    }
  }

  template <typename T>
  T load(const char* name, const char* expected, pybind11::handle value) const {
    pybind11::detail::make_caster<T> caster;
    // An integer is a number too; nothing else is converted.
    if (!caster.load(value, std::is_floating_point_v<T>)) {
      refuse(name, expected, value);
    }
    return pybind11::detail::cast_op<T>(caster);
  }

  [[noreturn]] void refuse(const char* name, const std::string& expected, pybind11::handle value) const {
    const std::string got = pybind11::repr(value);
    throw pybind11::type_error(function_ + ": " + name + " must be " + expected + ", got " + got);
  }

  const std::string function_;
  const pybind11::kwargs& given_;
  std::vector<const char*> taken_;
};

// A struct from its fields.
template <typename Params>
Params params_of(const char* function, const pybind11::kwargs& given) {
  Params params = {};
  Arguments arguments(function, given);
  fields(arguments, params);
  arguments.finish();
  return params;
}

// Give the module a function of a struct's fields, which is called without Python's lock.
template <typename Params>
void bind_call(pybind11::module_& module, const char* name, void (*call)(const Params&), const char* doc) {
  const auto function = [=](const pybind11::kwargs& given) {
    const auto params = params_of<Params>(name, given);
    const pybind11::gil_scoped_release unlocked;
    call(params);
  };
  module.def(name, function, doc);
}

}  // namespace peft_kernels
