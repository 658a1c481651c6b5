// Whether Python objects are what they were: what fastsep.optimize asks before each call of a model.
//
// MobileNetV2 has 177 modules, 1416 dicts and 314 tensors. Each is a chain of pointers to memory that the call before
// has displaced from the caches: to follow one after the other took 0.4 ms of 7. So all of their lines are asked for
// first, and are under way together. Until Python 3.11 a line of each dict is enough, its version: 0.28 ms instead of
// 0.42 for what is looked at now, in a call of 10 ms (Zen 3, one thread).
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tensors.h"

namespace fastsep {

class Unchanged {
 public:
  // Dicts: `held` shall have the same values, of `partly` the same ones shall be None. `slots` are dicts and names:
  // there shall be the same value under it, or none. Of `tensors` a snapshot shall hold.
  Unchanged(const pybind11::list& held, const pybind11::list& partly, const pybind11::list& slots,
            const pybind11::list& tensors);
  // Dicts that shall be empty, and further dicts that shall have the same values, of `modeless` but for the one named
  // "training". None of these is looked at before this.
  void set_surroundings(const pybind11::list& empty, const pybind11::list& held, const pybind11::list& modeless);
  bool holds() const;

 private:
  using Handle = pybind11::handle;

  // Dicts whose values are known. Those are next to each other for all of them, to be read from memory as such.
  class Dicts {
   public:
    // Any value will do under the name `ignored`.
    explicit Dicts(const pybind11::list& dicts, Handle ignored = Handle());
    // With `partly` it counts only which of them are None.
    bool are_same(bool partly) const;

   private:
    struct Dict {
      Handle dict;
      size_t first, count;
      uint64_t version;
    };
    void append_values(Handle dict, Handle ignored);
    bool is_same(const Dict& known, bool partly) const;
    mutable std::vector<Dict> dicts_;
    std::vector<Handle> values_;
  };
  struct Slot {
    Handle dict, name, value;  // no value: none
  };

  static bool is_same(const Slot& known);
  void add_lines_of(const pybind11::list& dicts);
  void add_lines(const void* begin, size_t bytes);

  Dicts held_, partly_, surroundings_, modeless_;
  std::vector<Handle> empty_;
  std::vector<Slot> slots_;
  Snapshot tensors_;
  std::vector<const char*> lines_;
};

}  // namespace fastsep
