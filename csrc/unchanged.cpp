#include "unchanged.h"

#include <algorithm>

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

// Until 3.11 a dict has a number that no other has ever had, and another one after each change.
#if PY_VERSION_HEX < 0x030C0000
constexpr bool has_versions = true;
uint64_t version_of(py::handle dict) { return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag; }
#else
constexpr bool has_versions = false;
uint64_t version_of(py::handle) { return 0; }
#endif

const PyDictObject& as_dict(py::handle object) { return *reinterpret_cast<const PyDictObject*>(object.ptr()); }

// What shall be a dict: everything here reads them as such.
py::handle checked_dict(py::handle object) {
  if (!PyDict_Check(object.ptr())) throw py::type_error("expected a dict");
  return object;
}

}  // namespace

Unchanged::Dicts::Dicts(const py::list& dicts, py::handle ignored) {
  for (const py::handle dict : dicts) {
    const size_t first = values_.size();
    checked_dict(dict);  // not under the lock, which an exception would leave closed
    FASTSEP_LOCKED(dict.ptr(), append_values(dict, ignored));
    dicts_.push_back({dict, first, values_.size() - first, version_of(dict)});
  }
}

void Unchanged::Dicts::append_values(py::handle dict, py::handle ignored) {
  PyObject *name = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &name, &value);)
    values_.push_back(ignored && PyUnicode_Check(name) && PyUnicode_Compare(name, ignored.ptr()) == 0 ? nullptr
                                                                                                      : value);
}

bool Unchanged::Dicts::are_same(bool partly) const {
  bool same = true;
  for (Dict& known : dicts_) {
    const uint64_t version = version_of(known.dict);
    if (has_versions && version == known.version) continue;
    FASTSEP_LOCKED(known.dict.ptr(), same = is_same(known, partly));
    if (!same) return false;
    if (has_versions) known.version = version;
  }
  return true;
}

bool Unchanged::Dicts::is_same(const Dict& known, bool partly) const {
  PyObject* const dict = known.dict.ptr();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(known.count)) return false;
  PyObject* value = nullptr;
  Py_ssize_t at = 0;
  for (size_t i = 0; i < known.count; ++i) {
    const py::handle expected = values_[known.first + i];
    if (!PyDict_Next(dict, &at, nullptr, &value)) return false;
    if (!expected) continue;
    if (partly ? (value == Py_None) != expected.is_none() : value != expected.ptr()) return false;
  }
  return true;
}

Unchanged::Unchanged(const py::list& held, const py::list& partly, const py::list& slots, const py::list& tensors)
    : held_(held), partly_(partly), surroundings_(py::list()), modeless_(py::list()), tensors_(tensors) {
  add_lines_of(held);
  add_lines_of(partly);
  for (const py::handle slot : slots) {
    const auto pair = py::cast<py::tuple>(slot);
    const py::handle dict = checked_dict(pair[0]), name = py::object(pair[1]);
    slots_.push_back({dict, name, PyDict_GetItemWithError(dict.ptr(), name.ptr())});
  }
}

void Unchanged::set_surroundings(const py::list& empty, const py::list& held, const py::list& modeless) {
  empty_.clear();
  for (const py::handle dict : empty) empty_.push_back(checked_dict(dict));
  surroundings_ = Dicts(held), modeless_ = Dicts(modeless, py::str("training"));
  add_lines_of(held);
  add_lines_of(modeless);
}

void Unchanged::add_lines(const void* begin, size_t bytes) {
  constexpr uintptr_t line = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t at = first / line * line; at < first + bytes; at += line)
    lines_.push_back(reinterpret_cast<const char*>(at));
}

// Where the entries are may change, and the lines are of no use then; they are never read.
void Unchanged::add_lines_of(const py::list& dicts) {
  for (const py::handle object : dicts) {
    const PyDictObject& dict = as_dict(object);
    add_lines(&dict.ma_used, sizeof(PyDictObject) - offsetof(PyDictObject, ma_used));
    if (dict.ma_used == 0 || has_versions) continue;
    if (dict.ma_values == nullptr)
      add_lines(dict.ma_keys, 192);  // a module's parameters take two lines or three
    else
      add_lines(dict.ma_values, static_cast<size_t>(dict.ma_used) * sizeof(PyObject*));  // the keys are the class's
  }
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

bool Unchanged::holds() const {
  for (const char* at : lines_) __builtin_prefetch(at, 0, 2);
  for (const py::handle dict : empty_) __builtin_prefetch(&as_dict(dict).ma_used, 0, 2);
  tensors_.prefetch();
  if (!held_.are_same(false) || !partly_.are_same(true) || !surroundings_.are_same(false) || !modeless_.are_same(false))
    return false;
  if (!std::all_of(empty_.begin(), empty_.end(), [](py::handle dict) { return PyDict_GET_SIZE(dict.ptr()) == 0; }))
    return false;
  bool same = true;
  for (const Slot& known : slots_) {
    FASTSEP_LOCKED(known.dict.ptr(), same = is_same(known));
    if (!same) return false;
  }
  return tensors_.holds();
}

}  // namespace fastsep
