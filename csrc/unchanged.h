// Whether Python objects are what they were: what fastsep.optimize asks before each call of a model.
//
// MobileNetV2 has 177 modules, 1235 dicts and 314 tensors. Each is a chain of pointers to memory that the call before
// has displaced from the caches: to follow one after the other took 0.4 ms of 7. So all of their lines are asked for
// first, and are under way together.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fastsep {

class Unchanged {
 public:
  // Dicts: `held` shall have the same values, of `partly` the same ones shall be None. `slots` are dicts and names:
  // there shall be the same value under it, or none. `modules` shall have the same `training`, `tensors` the same
  // integer by the descriptor `version`, and the first `placed` of them the same by the function `place`. `lines` are
  // addresses of memory that this will read.
  Unchanged(const pybind11::list& held, const pybind11::list& partly, const pybind11::list& slots,
            const pybind11::list& modules, const pybind11::list& tensors, size_t placed,
            const pybind11::object& version, const pybind11::object& place, const std::vector<uintptr_t>& lines);
  // Dicts that shall be empty.
  void set_empty(const pybind11::list& dicts);
  bool holds() const;

 private:
  using Handle = pybind11::handle;
  // Its values begin at `first` in values_; these are next to each other for all dicts, to be read from memory as such.
  struct Dict {
    Handle dict;
    size_t first, count;
    bool partly;
  };
  struct Slot {
    Handle dict, name, value;  // no value: none
  };
  struct Module {
    Handle module;
    bool training;
  };
  struct Tensor {
    Handle tensor;
    long long version;
    unsigned long long place;
  };

  void append_values(Handle dict);
  bool is_same(const Dict& known) const;
  static bool is_same(const Slot& known);
  void add_lines(const void* begin, size_t bytes);
  void add_lines_of_dict(Handle object);
  bool is_training(Handle module) const;
  long long version_of(Handle tensor) const;
  unsigned long long place_of(Handle tensor) const;

  pybind11::object training_ = pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString("training"));
  pybind11::object version_, place_;
  std::vector<Dict> dicts_;
  std::vector<Handle> values_;
  std::vector<Handle> empty_;
  std::vector<Slot> slots_;
  std::vector<Module> modules_;
  std::vector<Tensor> tensors_;
  size_t placed_;
  std::vector<const char*> lines_;
};

}  // namespace fastsep
