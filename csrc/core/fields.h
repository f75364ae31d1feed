// What a launch takes, as one list of named fields beside the struct that they fill; bind.h makes its binding of the
// list. Plain C++.
#pragma once

#include <tuple>

namespace peft_kernels {

// An argument and the members that it fills: one by its value, several by a tuple of their values, as a tensor comes as
// its address and strides.
template <typename... Members>
struct Field {
  const char* name;
  std::tuple<Members...> members;
};

template <typename... Members>
constexpr Field<Members...> field(const char* name, Members... members) {
  return {name, {members...}};
}

// The arguments that fill a member with a list of its own.
template <typename Member, typename List>
struct Part {
  Member member;
  List fields;
};

template <typename Member, typename List>
constexpr Part<Member, List> part(Member member, List fields) {
  return {member, fields};
}

}  // namespace peft_kernels
