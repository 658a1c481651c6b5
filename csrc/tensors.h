// What torch says of a tensor: where its numbers lie, how, and whether that memory is there.
//
// torch exports C functions for compiled models, by a stable interface; their addresses are lent at import, as those of
// its threads are (see fastsep/_native.py). Each takes a few nanoseconds, the same question by way of Python fifty.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fastsep {

// Lends them, by their names, and what a tensor is in Python. `base` is the type that has the attributes _cdata,
// layout, is_nested and _version and the method is_neg. Objects of the types `plain` are what they seem. `examples` are
// a contiguous tensor of the layout `strided` on the CPU and the bytes of an element, for each dtype. False where the
// functions do not answer what is known of those.
bool lend_tensors(const pybind11::dict& functions, const pybind11::type& base, const pybind11::tuple& plain,
                  const pybind11::object& strided, const pybind11::list& examples);

// A tensor as it lies in memory. The arrays belong to the tensor.
struct TensorView {
  const char* data;
  int64_t storage_bytes, offset, dims;
  const int64_t *sizes, *strides;
  int32_t dtype, device;
  int64_t element_bytes;

  // From the first element to behind the last.
  int64_t bytes() const;
  // Whether all of those are memory of the storage.
  bool is_inside() const;
};

// Two functions of Python, for any number of tensors, among which None passes.
//
// stored(*tensors): 1 or 2 where the numbers of all of these are what lies at their addresses, on the CPU or on a GPU
// of CUDA, else 0. They are of plain types, strided, not lazily negated or zero, and their elements inside their
// storages.
//
// have_memory(*tensors): whether the last holds, for tensors that torch's dispatcher has brought to a kernel.
void define_stored(pybind11::module_& module);

// Tensors as they are: where, how, which version, and some of their numbers.
//
// A write counts a tensor's version up, but not every one does: not the fused optimizers, the statistics of a norm, or
// what goes by `.data`, NumPy or another library. So of each tensor 64 numbers are looked at, too (of a float32's; all
// where there are no more): the first 16, the last 16, and 16 behind either third. Who writes to none of these and
// counts no version is not seen.
class Snapshot {
 public:
  explicit Snapshot(const pybind11::sequence& tensors);
  // Whether the tensors that it was made of are as they were. Keeps none of them alive.
  bool holds() const;
  // Whether these are as those were; other objects may stand for the same memory.
  bool matches(const std::vector<pybind11::handle>& tensors) const;
  // Has the memory fetched that the others read: what the call before has displaced from the caches.
  void prefetch() const;

 private:
  struct Known {
    pybind11::handle tensor;  // or None
    bool viewed;              // false for other types and layouts, of which the version is all that is known
    long long version;
    TensorView view;
    size_t shape, sample;  // its sizes and strides in shapes_ and its numbers in samples_ begin there
  };

  bool is_same(pybind11::handle tensor, const Known& known) const;

  std::vector<Known> known_;
  std::vector<int64_t> shapes_;
  std::vector<char> samples_;
  std::vector<const char*> lines_;
};

}  // namespace fastsep
