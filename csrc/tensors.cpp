#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <type_traits>

namespace py = pybind11;

namespace fastsep {

namespace {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// torch's functions take the address of an at::Tensor, which is a pointer to what it stands for and no more: `_cdata`.
using Handle = void* const*;

struct Functions {
  int32_t (*data)(Handle, void**);
  int32_t (*storage_bytes)(Handle, int64_t*);
  int32_t (*offset)(Handle, int64_t*);
  int32_t (*dims)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*device)(Handle, int32_t*);
  int32_t (*cpu)();
  int32_t (*cuda)();
};

// dtypes are small integers in torch.
constexpr size_t most_dtypes = 128;

struct Lent {
  Functions ask;
  int32_t cpu, cuda;
  std::array<int64_t, most_dtypes> element_bytes;  // 0 for a dtype that is not known
  // Held for as long as the process lives: there is no time at its end at which to give them back.
  PyObject *cdata, *layout, *is_nested, *version, *is_neg, *strided;
  PyTypeObject* base;
  std::array<PyTypeObject*, 2> plain;
};

Lent lent = {};

PyObject* get(PyObject* descriptor, py::handle object) {
  return Py_TYPE(descriptor)
      ->tp_descr_get(descriptor, object.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
}

bool is_plain(py::handle tensor) {
  const PyTypeObject* const type = Py_TYPE(tensor.ptr());
  return type == lent.plain[0] || type == lent.plain[1];
}

// Of a plain tensor.
bool is_strided(py::handle tensor) {
  if (owned(get(lent.layout, tensor)).ptr() != lent.strided) return false;
  PyObject* const arguments[] = {tensor.ptr()};
  if (owned(PyObject_Vectorcall(lent.is_neg, arguments, 1, nullptr)).ptr() != Py_False) return false;
  return owned(get(lent.is_nested, tensor)).ptr() == Py_False;
}

// Of a plain tensor that is strided. False where torch does not answer.
bool look(py::handle tensor, TensorView* view) {
  void* impl = PyLong_AsVoidPtr(owned(get(lent.cdata, tensor)).ptr());
  if (impl == nullptr) throw py::error_already_set();
  const Handle handle = &impl;
  const Functions& ask = lent.ask;
  if (ask.device(handle, &view->device) != 0) return false;
  // Others may have no storage.
  if (view->device != lent.cpu && view->device != lent.cuda) return false;
  void* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (ask.storage_bytes(handle, &view->storage_bytes) != 0 || ask.offset(handle, &view->offset) != 0 ||
      ask.dims(handle, &view->dims) != 0 || ask.sizes(handle, &sizes) != 0 || ask.strides(handle, &strides) != 0 ||
      ask.dtype(handle, &view->dtype) != 0 || ask.data(handle, &data) != 0)
    return false;
  view->data = static_cast<const char*>(data), view->sizes = sizes, view->strides = strides;
  const bool known = view->dtype >= 0 && static_cast<size_t>(view->dtype) < most_dtypes;
  view->element_bytes = known ? lent.element_bytes[static_cast<size_t>(view->dtype)] : 0;
  return view->element_bytes != 0;
}

PyObject* stored(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  int32_t device = -1;
  try {
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (tensors[i] == Py_None) continue;
      TensorView view;
      if (!is_plain(tensors[i]) || !is_strided(tensors[i]) || !look(tensors[i], &view) || !view.is_inside() ||
          (device >= 0 && view.device != device))
        return PyLong_FromLong(0);
      device = view.device;
    }
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  return PyLong_FromLong(device == lent.cuda ? 2 : device == lent.cpu ? 1 : 0);
}

PyObject* have_memory(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  bool inside = true;
  try {
    for (Py_ssize_t i = 0; i < count && inside; ++i) {
      if (tensors[i] == Py_None) continue;
      TensorView view;
      inside = lent.base != nullptr && PyObject_TypeCheck(tensors[i], lent.base) && look(tensors[i], &view) &&
               view.is_inside();
    }
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  return PyBool_FromLong(inside);
}

// With no more than a pointer to the arguments: pybind11's own call takes as long as to look at two tensors.
PyMethodDef fast_method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, "See _core.pyi."};
}

PyMethodDef methods[] = {fast_method("stored", stored), fast_method("have_memory", have_memory)};

// -1 for what was made in torch.inference_mode(), which counts none.
long long version_of(py::handle tensor) {
  PyObject* const version = get(lent.version, tensor);
  if (version != nullptr) return PyLong_AsLongLong(owned(version).ptr());
  PyErr_Clear();
  return -1;
}

constexpr int64_t chunk = 64, chunks = 4;

// Calls with the place and size of each part of a view's memory that a snapshot looks at.
template <class Take>
void sample(const TensorView& view, Take take) {
  const int64_t bytes = view.bytes();
  if (bytes <= chunk * chunks) {
    if (bytes > 0) take(view.data, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < chunks; ++i) take(view.data + (bytes - chunk) * i / (chunks - 1), static_cast<size_t>(chunk));
}

}  // namespace

int64_t TensorView::bytes() const {
  int64_t extent = 1;
  for (int64_t i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return 0;
    extent += (sizes[i] - 1) * strides[i];
  }
  return extent * element_bytes;
}

bool TensorView::is_inside() const {
  const int64_t size = bytes(), first = offset * element_bytes;
  // Zeros of autograd have a size, and no memory.
  const bool is_there = reinterpret_cast<uintptr_t>(data) > static_cast<uintptr_t>(first);
  return size == 0 || (is_there && first + size <= storage_bytes);
}

bool lend_tensors(const py::dict& functions, const py::type& base, const py::tuple& plain, const py::object& strided,
                  const py::list& examples) {
  Lent made = {};
  const auto function = [&](const char* name, auto* pointer) {
    const std::string key = std::string("aoti_torch_") + name;
    const auto address = functions[key.c_str()].cast<uintptr_t>();
    *pointer = reinterpret_cast<std::remove_pointer_t<decltype(pointer)>>(address);
  };
  function("get_data_ptr", &made.ask.data);
  function("get_storage_size", &made.ask.storage_bytes);
  function("get_storage_offset", &made.ask.offset);
  function("get_dim", &made.ask.dims);
  function("get_sizes", &made.ask.sizes);
  function("get_strides", &made.ask.strides);
  function("get_dtype", &made.ask.dtype);
  function("get_device_type", &made.ask.device);
  function("device_type_cpu", &made.ask.cpu);
  function("device_type_cuda", &made.ask.cuda);
  const auto held = [&](const char* name) { return base.attr("__dict__")[name].cast<py::object>().release().ptr(); };
  made.cdata = held("_cdata"), made.layout = held("layout"), made.is_nested = held("is_nested");
  made.version = held("_version"), made.is_neg = held("is_neg");
  for (PyObject* descriptor : {made.cdata, made.layout, made.is_nested, made.version})
    if (Py_TYPE(descriptor)->tp_descr_get == nullptr) return false;
  made.base = reinterpret_cast<PyTypeObject*>(py::object(base).release().ptr());
  made.strided = py::object(strided).release().ptr();
  if (plain.size() != made.plain.size()) throw py::value_error("plain must have two types");
  for (size_t i = 0; i < made.plain.size(); ++i)
    made.plain[i] = reinterpret_cast<PyTypeObject*>(py::object(plain[i]).release().ptr());
  made.cpu = made.ask.cpu(), made.cuda = made.ask.cuda();
  made.element_bytes.fill(1);  // until the examples have told
  lent = made;
  made.element_bytes.fill(0);
  for (const py::handle example : examples) {
    const auto pair = py::cast<py::tuple>(example);
    const py::handle tensor = pair[0];
    TensorView view;
    if (!is_plain(tensor) || !is_strided(tensor) || !look(tensor, &view)) return lent = {}, false;
    const auto number = [&](const char* method) { return tensor.attr(method)().cast<int64_t>(); };
    const auto same = [&](const py::object& expected, const int64_t* values) {
      const auto numbers = py::cast<py::tuple>(expected);
      return static_cast<int64_t>(numbers.size()) == view.dims &&
             std::equal(numbers.begin(), numbers.end(), values,
                        [](py::handle a, int64_t b) { return a.cast<int64_t>() == b; });
    };
    const bool right = reinterpret_cast<int64_t>(view.data) == number("data_ptr") &&
                       view.storage_bytes == tensor.attr("untyped_storage")().attr("nbytes")().cast<int64_t>() &&
                       view.offset == number("storage_offset") && view.device == made.cpu &&
                       same(tensor.attr("shape"), view.sizes) && same(tensor.attr("stride")(), view.strides);
    if (!right) return lent = {}, false;
    made.element_bytes[static_cast<size_t>(view.dtype)] = pair[1].cast<int64_t>();
  }
  lent = made;
  return true;
}

void define_stored(py::module_& module) {
  for (PyMethodDef& method : methods) module.attr(method.ml_name) = owned(PyCFunction_New(&method, nullptr));
}

Snapshot::Snapshot(const py::sequence& tensors) {
  if (lent.cdata == nullptr) throw py::value_error("torch's functions have not been lent");
  for (const py::handle tensor : tensors) {
    Known known = {};
    known.tensor = tensor, known.shape = shapes_.size(), known.sample = samples_.size();
    known_.push_back(known);
    if (tensor.is_none()) continue;
    known.version = version_of(tensor);
    known.viewed = is_plain(tensor) && is_strided(tensor) && look(tensor, &known.view) && known.view.is_inside();
    lines_.push_back(reinterpret_cast<const char*>(tensor.ptr()));
    if (known.viewed) {
      const TensorView& view = known.view;
      shapes_.insert(shapes_.end(), view.sizes, view.sizes + view.dims);
      shapes_.insert(shapes_.end(), view.strides, view.strides + view.dims);
      const char* const impl = static_cast<const char*>(PyLong_AsVoidPtr(owned(get(lent.cdata, tensor)).ptr()));
      // A TensorImpl has 192 bytes or a little more.
      for (int64_t at = 0; at < 192; at += chunk) lines_.push_back(impl + at);
      if (view.device == lent.cpu)
        sample(view, [&](const char* data, size_t bytes) {
          samples_.insert(samples_.end(), data, data + bytes);
          for (size_t at = 0; at < bytes; at += static_cast<size_t>(chunk)) lines_.push_back(data + at);
        });
    }
    known_.back() = known;
  }
}

void Snapshot::prefetch() const {
  for (const char* line : lines_) __builtin_prefetch(line, 0, 2);
}

bool Snapshot::is_same(py::handle tensor, const Known& known) const {
  if (tensor.is_none() || known.tensor.is_none()) return tensor.is_none() == known.tensor.is_none();
  if (version_of(tensor) != known.version) return false;
  if (!known.viewed) return tensor.is(known.tensor);
  TensorView now;
  if (!is_plain(tensor) || !look(tensor, &now)) return false;
  const TensorView& then = known.view;
  if (now.data != then.data || now.storage_bytes != then.storage_bytes || now.dims != then.dims ||
      now.dtype != then.dtype || now.device != then.device)
    return false;
  const int64_t* const sizes = shapes_.data() + known.shape;
  if (!std::equal(sizes, sizes + now.dims, now.sizes) ||
      !std::equal(sizes + now.dims, sizes + 2 * now.dims, now.strides))
    return false;
  bool same = true;
  const char* expected = samples_.data() + known.sample;
  if (now.device == lent.cpu)
    sample(now, [&](const char* data, size_t bytes) {
      same = same && std::memcmp(data, expected, bytes) == 0;
      expected += bytes;
    });
  return same;
}

bool Snapshot::holds() const {
  return std::all_of(known_.begin(), known_.end(), [&](const Known& known) { return is_same(known.tensor, known); });
}

bool Snapshot::matches(const std::vector<py::handle>& tensors) const {
  return tensors.size() == known_.size() &&
         std::equal(tensors.begin(), tensors.end(), known_.begin(),
                    [&](py::handle tensor, const Known& known) { return is_same(tensor, known); });
}

}  // namespace fastsep
