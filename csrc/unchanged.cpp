#include "unchanged.h"

namespace py = pybind11;

// Where there is no global lock, nobody shall write to a dict that is walked.
#if PY_VERSION_HEX >= 0x030D0000
#define FASTSEP_LOCKED(object, ...)  \
  Py_BEGIN_CRITICAL_SECTION(object); \
  __VA_ARGS__;                       \
  Py_END_CRITICAL_SECTION()
#else
#define FASTSEP_LOCKED(object, ...) __VA_ARGS__
#endif

namespace fastsep {

namespace {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

const PyDictObject& as_dict(py::handle object) { return *reinterpret_cast<const PyDictObject*>(object.ptr()); }

// What shall be a dict: everything here reads them as such.
py::handle checked_dict(py::handle object) {
  if (!PyDict_Check(object.ptr())) throw py::type_error("expected a dict");
  return object;
}

}  // namespace

Unchanged::Unchanged(const py::list& held, const py::list& partly, const py::list& slots, const py::list& modules,
                     const py::list& tensors, size_t placed, const py::object& version, const py::object& place,
                     const std::vector<uintptr_t>& lines)
    : version_(version), place_(place), placed_(placed) {
  if (Py_TYPE(version.ptr())->tp_descr_get == nullptr) throw py::type_error("version must be a descriptor");
  if (placed > tensors.size()) throw py::value_error("placed is larger than the number of tensors");
  for (const bool part : {false, true})
    for (const py::handle dict : part ? partly : held) {
      const size_t first = values_.size();
      checked_dict(dict);  // not under the lock, which an exception would leave closed
      FASTSEP_LOCKED(dict.ptr(), append_values(dict));
      dicts_.push_back({dict, first, values_.size() - first, part});
      add_lines_of_dict(dict);
    }
  for (const py::handle slot : slots) {
    const auto pair = py::cast<py::tuple>(slot);
    const py::handle dict = checked_dict(pair[0]), name = py::object(pair[1]);
    slots_.push_back({dict, name, PyDict_GetItemWithError(dict.ptr(), name.ptr())});
  }
  for (const py::handle module : modules) {
    modules_.push_back({module, is_training(module)});
    add_lines(module.ptr(), 1);
    add_lines_of_dict(checked_dict(module.attr("__dict__")));
  }
  for (const py::handle tensor : tensors) {
    const bool is_placed = tensors_.size() < placed_;
    tensors_.push_back({tensor, version_of(tensor), is_placed ? place_of(tensor) : 0});
    add_lines(tensor.ptr(), 64);
  }
  // A TensorImpl has 192 bytes or a little more.
  for (const uintptr_t at : lines) add_lines(reinterpret_cast<const void*>(at), 192);
}

void Unchanged::set_empty(const py::list& dicts) {
  empty_.clear();
  for (const py::handle dict : dicts) empty_.push_back(checked_dict(dict));
}

void Unchanged::append_values(py::handle dict) {
  PyObject* value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, nullptr, &value);) values_.push_back(value);
}

void Unchanged::add_lines(const void* begin, size_t bytes) {
  constexpr uintptr_t line = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t at = first / line * line; at < first + bytes; at += line)
    lines_.push_back(reinterpret_cast<const char*>(at));
}

// Where the entries are may change, and the lines are of no use then; they are never read.
void Unchanged::add_lines_of_dict(py::handle object) {
  const PyDictObject& dict = as_dict(object);
  add_lines(&dict.ma_used, sizeof(PyDictObject) - offsetof(PyDictObject, ma_used));
  if (dict.ma_used == 0) return;
  // A module's parameters take two lines or three.
  add_lines(dict.ma_keys, 192);
  if (dict.ma_values != nullptr) add_lines(dict.ma_values, 1);
}

bool Unchanged::is_same(const Dict& known) const {
  PyObject* const dict = known.dict.ptr();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(known.count)) return false;
  PyObject* value = nullptr;
  Py_ssize_t at = 0;
  for (size_t i = 0; i < known.count; ++i) {
    const py::handle expected = values_[known.first + i];
    if (!PyDict_Next(dict, &at, nullptr, &value)) return false;
    if (known.partly ? (value == Py_None) != expected.is_none() : value != expected.ptr()) return false;
  }
  return true;
}

bool Unchanged::is_same(const Slot& known) {
  PyObject* const value = PyDict_GetItemWithError(known.dict.ptr(), known.name.ptr());
  // Nothing is raised while the dict is locked: whatever went wrong, the slow way will meet it again.
  if (value == nullptr && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return value == known.value.ptr();
}

bool Unchanged::is_training(py::handle module) const {
  const int answer = PyObject_IsTrue(owned(PyObject_GetAttr(module.ptr(), training_.ptr())).ptr());
  if (answer < 0) throw py::error_already_set();
  return answer != 0;
}

// By the descriptor itself, and the function below itself, which need not be looked up by their names.
long long Unchanged::version_of(py::handle tensor) const {
  PyObject* const self = tensor.ptr();
  const auto get = Py_TYPE(version_.ptr())->tp_descr_get;
  return PyLong_AsLongLong(owned(get(version_.ptr(), self, reinterpret_cast<PyObject*>(Py_TYPE(self)))).ptr());
}

unsigned long long Unchanged::place_of(py::handle tensor) const {
  PyObject* const arguments[] = {tensor.ptr()};
  return PyLong_AsUnsignedLongLong(owned(PyObject_Vectorcall(place_.ptr(), arguments, 1, nullptr)).ptr());
}

bool Unchanged::holds() const {
  for (const char* at : lines_) __builtin_prefetch(at, 0, 2);
  for (const py::handle dict : empty_) __builtin_prefetch(&as_dict(dict).ma_used, 0, 2);
  bool same = true;
  for (const Dict& known : dicts_) {
    FASTSEP_LOCKED(known.dict.ptr(), same = is_same(known));
    if (!same) return false;
  }
  for (const py::handle dict : empty_)
    if (PyDict_GET_SIZE(dict.ptr()) != 0) return false;
  for (const Slot& known : slots_) {
    FASTSEP_LOCKED(known.dict.ptr(), same = is_same(known));
    if (!same) return false;
  }
  for (const Module& known : modules_)
    if (is_training(known.module) != known.training) return false;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& known = tensors_[i];
    if (version_of(known.tensor) != known.version) return false;
    if (i < placed_ && place_of(known.tensor) != known.place) return false;
  }
  return true;
}

}  // namespace fastsep
