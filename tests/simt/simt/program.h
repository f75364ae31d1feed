// A test program's talk with Python (tests/simt/build.py): numbers as name=value arguments, tensors as raw files.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "simt/buffer.h"
#include "simt/builtins.h"

namespace simt {

class Arguments {
 public:
  Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string text = argv[i];
      const size_t equals = text.find('=');
      values_[text.substr(0, equals)] = equals == std::string::npos ? "" : text.substr(equals + 1);
    }
  }
  bool has(const std::string& name) const { return values_.count(name) > 0; }
  std::string text(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) {
      throw Error("the argument " + name + " is missing");
    }
    return found->second;
  }
  int64_t integer(const std::string& name) const { return std::stoll(text(name)); }
  double number(const std::string& name) const { return std::stod(text(name)); }

  // The tensor that Python wrote under this name; empty where it wrote none.
  Buffer input(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    Buffer buffer(name, bytes.size());
    if (!bytes.empty()) {
      std::memcpy(buffer.data<char>(), bytes.data(), bytes.size());
    }
    return buffer;
  }
  void write(const Buffer& buffer) const {
    std::ofstream file(path(buffer.name()), std::ios::binary);
    file.write(buffer.data<char>(), static_cast<std::streamsize>(buffer.bytes()));
  }

 private:
  std::string path(const std::string& name) const { return text("folder") + "/" + name; }

  std::map<std::string, std::string> values_;
};

// Run a launch under the schedules first_seed to first_seed + schedules - 1. Before each, outputs are poisoned; after
// each, the canaries of all buffers must stand and inputs be as they were; the bits of every output must be those of
// the first schedule. `run` takes the seed.
inline void run_schedules(const Arguments& arguments,
                          const std::vector<Buffer*>& inputs,
                          const std::vector<Buffer*>& outputs,
                          const std::function<void(uint64_t)>& run) {
  const auto bits = [](const Buffer* buffer) {
    return std::vector<char>(buffer->data<char>(), buffer->data<char>() + buffer->bytes());
  };
  std::vector<std::vector<char>> before, first;
  for (const Buffer* input : inputs) {
    before.push_back(bits(input));
  }
  const auto seed = static_cast<uint64_t>(arguments.integer("first_seed"));
  const auto schedules = static_cast<uint64_t>(arguments.integer("schedules"));
  for (uint64_t schedule = seed; schedule < seed + schedules; ++schedule) {
    for (Buffer* output : outputs) {
      output->poison();
    }
    run(schedule);
    const std::string where = " [schedule " + std::to_string(schedule) + "]";
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs[i]->check();
      if (bits(inputs[i]) != before[i]) {
        throw Error("the input " + inputs[i]->name() + " was written to" + where);
      }
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      outputs[i]->check();
      if (schedule == seed) {
        first.push_back(bits(outputs[i]));
      } else if (bits(outputs[i]) != first[i]) {
        throw Error("the bits of " + outputs[i]->name() + " differ between schedules" + where);
      }
    }
  }
  for (const Buffer* output : outputs) {
    arguments.write(*output);
  }
}

// The main() of a test program: what the emulator finds wrong goes to stderr, and the exit status is 3.
inline int main_of(int argc, char** argv, void (*body)(const Arguments&)) {
  report_traps();
  try {
    body(Arguments(argc, argv));
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::cerr << "simt: " << error.what() << std::endl;
    return 3;
  }
  return 0;
}

}  // namespace simt
