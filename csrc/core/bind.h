// Functions of the module that fill a struct from keyword arguments, by its list of fields (fields.h).
//
// A pointer comes as an integer, or None or 0 for null; an enumerator by its name. An argument that is missing, unknown
// or of a wrong type is a TypeError that names it, an unknown name of an enumerator a ValueError.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/fields.h"
#include "core/names.h"

namespace peft_kernels {

class Arguments {
 public:
  Arguments(const char* function, const pybind11::kwargs& given) : function_(function), given_(given) {}

  template <typename Params, typename... Fields>
  void fill(Params& params, const std::tuple<Fields...>& list) {
    std::apply([&](const auto&... each) { (fill(params, each), ...); }, list);
  }

  template <typename Params, typename... Members>
  void fill(Params& params, const Field<Members...>& field) {
    const pybind11::handle value = take(field.name);
    if constexpr (sizeof...(Members) == 1) {
      convert(field.name, value, params.*std::get<0>(field.members));
    } else if (!value.is_none()) {
      if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != sizeof...(Members)) {
        refuse(field.name, "a tuple of " + std::to_string(sizeof...(Members)) + " or None", value);
      }
      Py_ssize_t i = 0;
      const auto item = [&] { return pybind11::handle(PyTuple_GET_ITEM(value.ptr(), i++)); };
      std::apply([&](auto... member) { (convert(field.name, item(), params.*member), ...); }, field.members);
    }
  }

  template <typename Params, typename Member, typename List>
  void fill(Params& params, const Part<Member, List>& part) {
    fill(params.*part.member, part.fields);
  }

  template <typename T>
  void fill(const char* name, T& value) {
    convert(name, take(name), value);
  }

  // Refuse the arguments that nobody has taken.
  void finish() const {
    if (taken_.size() == given_.size()) {
      return;
    }
    for (const auto& [key, value] : given_) {
      const std::string name = pybind11::str(key);
      if (std::find(taken_.begin(), taken_.end(), name) == taken_.end()) {
        throw pybind11::type_error(std::string(function_) + ": there is no argument " + name);
      }
    }
  }

 private:
  pybind11::handle take(const char* name) {
    const pybind11::handle value = PyDict_GetItemString(given_.ptr(), name);
    if (!value) {
      throw pybind11::type_error(std::string(function_) + ": the argument " + name + " is missing");
    }
    taken_.push_back(name);
    return value;
  }

  template <typename T>
  void convert(const char* name, pybind11::handle value, T& member) const {
    if constexpr (std::is_enum_v<T>) {
      if (!pybind11::isinstance<pybind11::str>(value)) {
        refuse(name, "a name", value);
      }
      member = value_of<T>(value.cast<std::string>(), std::string(function_) + ": " + name);
    } else if constexpr (std::is_pointer_v<T>) {
      uintptr_t address = 0;
      if (!value.is_none()) {
        load(name, "an address or None", value, address);
      }
      member = reinterpret_cast<T>(address);
    } else if constexpr (std::is_same_v<T, bool>) {
      load(name, "a bool", value, member);
    } else if constexpr (std::is_floating_point_v<T>) {
      load(name, "a number", value, member);
    } else {
      const char* sign = std::is_signed_v<T> ? "a signed" : "an unsigned";
      load(name, sign + (" integer of " + std::to_string(8 * sizeof(T))) + " bits", value, member);
    }
  }

  template <typename T>
  void load(const char* name, const std::string& expected, pybind11::handle value, T& member) const {
    pybind11::detail::make_caster<T> caster;
    // An integer is a number too; nothing else is converted.
    if (!caster.load(value, std::is_floating_point_v<T>)) {
      refuse(name, expected, value);
    }
    member = static_cast<T>(caster);
  }

  [[noreturn]] void refuse(const char* name, const std::string& expected, pybind11::handle value) const {
    const std::string got = pybind11::repr(value);
    throw pybind11::type_error(std::string(function_) + ": " + name + " must be " + expected + ", got " + got);
  }

  const char* function_;
  const pybind11::kwargs& given_;
  std::vector<const char*> taken_;
};

// Give the module a function of a struct's fields and the stream, which is called without Python's lock.
template <typename Params, typename List>
void bind_launch(pybind11::module_& module,
                 const char* name,
                 void (*launch)(const Params&, cudaStream_t),
                 const List& fields,
                 const char* doc) {
  module.def(
      name,
      [=](const pybind11::kwargs& given) {
        Params params = {};
        cudaStream_t stream = nullptr;
        Arguments arguments(name, given);
        arguments.fill(params, fields);
        arguments.fill("stream", stream);
        arguments.finish();
        const pybind11::gil_scoped_release unlocked;
        launch(params, stream);
      },
      doc);
}

}  // namespace peft_kernels
