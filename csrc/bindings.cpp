// The Python module _core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/parallel.h"
#include "cpu/series.h"
#include "fastsep.h"
#include "tensors.h"
#include "unchanged.h"

namespace py = pybind11;
using namespace fastsep;

namespace {

Problem to_problem(const py::tuple& fields) {
  const Problem problem = read_problem(fields);
  check(validate(problem));
  return problem;
}

std::vector<std::string> isa_names(bool runnable) {
  std::vector<std::string> names;
  for (int32_t i = 0; i < isa_count; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (runnable ? isa_available(isa) : isa_compiled(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

Isa to_isa(const std::string& name) {
  Isa isa;
  std::string here;
  for (const std::string& known : isa_names(true)) here += (here.empty() ? "" : ", ") + known;
  if (name.empty()) {
    if (best_isa(&isa) == Status::ok) return isa;
    const char* forced = std::getenv("FASTSEP_ISA");
    throw py::value_error("FASTSEP_ISA is '" + std::string(forced == nullptr ? "" : forced) +
                          "', expected one that is compiled in and runs on this processor: " + here);
  }
  if (!isa_from_name(name.c_str(), &isa)) throw py::value_error("isa is '" + name + "', which is not known");
  if (!isa_available(isa)) throw py::value_error("isa is '" + name + "', which does not run on this processor");
  return isa;
}

// FASTSEP_ISA is read once: looking it up and asking the processor takes longer than a small layer.
Isa fast_isa(const std::string& name) {
  static std::atomic<Isa> best{Isa::best};
  if (!name.empty()) return to_isa(name);
  if (best == Isa::best) best = to_isa(name);
  return best;
}

Weights to_weights(uintptr_t depthwise_weight, uintptr_t depthwise_bias, uintptr_t pointwise_weight, uintptr_t bias,
                   uintptr_t expand_weight = 0, uintptr_t expand_bias = 0) {
  return {address(depthwise_weight), address(depthwise_bias), address(pointwise_weight), address(bias),
          address(expand_weight),    address(expand_bias)};
}

// Memory of this size comes fresh from the operating system at every allocation (glibc's largest threshold for mmap),
// and its pages one by one as they are written: for the 51 MB that 16 images of 112 x 112 x 64 are, two thirds of the
// time. A hint that all of it will be written makes them larger, where the system is set to listen.
constexpr size_t fresh_bytes = size_t{32} << 20;

void expect_writes(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (memory == nullptr || bytes < fresh_bytes) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // as well not
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

void expect_output(const Problem& p, void* output) { expect_writes(output, output_bytes(p)); }

// Scratch memory of one thread's calls, kept between them: fresh pages would cost a small layer more than its work.
class Workspace {
 public:
  void* ask(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
      memory_.reset(std::aligned_alloc(alignment, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
      expect_writes(memory_.get(), size_);
    }
    return memory_.get();
  }
  void give_back() {
    if (size_ > keep) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t alignment = 64, keep = fresh_bytes;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

thread_local Workspace workspace;
thread_local Isa last_isa = Isa::best;

template <class Ask, class Run>
void run_in_workspace(Ask ask, Run run) {
  const Executor executor = current_executor();
  size_t bytes = 0;
  check(ask(executor.threads, &bytes));
  void* memory = workspace.ask(bytes);
  Status status;
  {
    py::gil_scoped_release release;
    status = run(memory, bytes, executor);
  }
  workspace.give_back();
  check(status);
}

template <class Run>
void run_forward(const Problem& problem, Isa isa, bool with_packed, Run run) {
  const auto ask = [&](int threads, size_t* bytes) {
    return workspace_bytes(problem, isa, threads, with_packed, bytes);
  };
  run_in_workspace(ask, run);
  last_isa = isa;
}

void forward_plain(const py::tuple& fields, const std::string& isa_name, uintptr_t input, uintptr_t depthwise_weight,
                   uintptr_t depthwise_bias, uintptr_t pointwise_weight, uintptr_t bias, uintptr_t output,
                   uintptr_t expand_weight, uintptr_t expand_bias) {
  const Problem problem = to_problem(fields);
  const Isa isa = fast_isa(isa_name);
  const Weights weights =
      to_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias);
  expect_output(problem, mutable_address(output));
  run_forward(problem, isa, true, [&](void* memory, size_t bytes, const Executor& executor) {
    return forward_unpacked(problem, isa, address(input), weights, mutable_address(output), memory, bytes, executor);
  });
}

void forward_packed(const py::tuple& fields, const std::string& isa_name, uintptr_t input, uintptr_t packed,
                    size_t packed_size, uintptr_t output, uintptr_t gate, uintptr_t residual) {
  const Problem problem = to_problem(fields);
  const Isa isa = fast_isa(isa_name);
  expect_output(problem, mutable_address(output));
  run_forward(problem, isa, false, [&](void* memory, size_t bytes, const Executor& executor) {
    const Inputs inputs(address(input), address(gate), address(residual));
    return forward(problem, isa, inputs, address(packed), packed_size, mutable_address(output), memory, bytes,
                   executor);
  });
}

// A problem, its packed weights and their size, and the values that it reads: x, gate, residual. Or the fields of an
// interleave, nothing, and the two values.
using SeriesFields = std::tuple<py::tuple, uintptr_t, size_t, int, int, int>;

Interleave to_interleave(const py::tuple& fields) {
  const auto field = [&](size_t i) { return fields[i].cast<int64_t>(); };
  const Dtype dtype = field(0) == 0 ? Dtype::f32 : field(0) == 1 ? Dtype::f64 : Dtype::f16;
  const Interleave interleave = {dtype, field(1), field(2), field(3), field(4), field(5)};
  check(validate(interleave));
  return interleave;
}

// What is known of a value of a series.
struct SeriesValue {
  bool known;  // false for an input that no call has read so far
  size_t bytes;
};

void expect_operand(const std::string& call, int value, size_t takes, std::vector<SeriesValue>* values) {
  if (value < 0 || static_cast<size_t>(value) >= values->size())
    throw py::value_error(call + " reads value " + std::to_string(value) + ", expected one of the " +
                          std::to_string(values->size()) + " before it");
  SeriesValue& known = (*values)[static_cast<size_t>(value)];
  if (known.known && known.bytes != takes)
    throw py::value_error(call + " takes " + std::to_string(takes) + " bytes, but value " + std::to_string(value) +
                          " has " + std::to_string(known.bytes));
  known = {true, takes};
}

Series to_series(const std::vector<SeriesFields>& fields, int inputs, const std::vector<int>& outputs) {
  constexpr size_t interleave_fields = 6;
  if (fields.empty()) throw py::value_error("calls is empty, expected at least one");
  if (inputs < 1) throw py::value_error("inputs is " + std::to_string(inputs) + ", expected at least one");
  std::vector<Series::Call> calls;
  std::vector<SeriesValue> values(static_cast<size_t>(inputs), {false, 0});
  for (const auto& [what, packed, packed_size, first, second, third] : fields) {
    const std::string name = "call " + std::to_string(calls.size());
    Series::Call call = {{}, first, second, third};
    if (what.size() == interleave_fields) {
      call.what = to_interleave(what);
    } else {
      const Problem problem = to_problem(what);
      if (problem.gate != (second != Series::none) || (third != Series::none && !problem.residual))
        throw py::value_error(name + " has a gate or residual that its problem has not, or the other way round");
      call.what = Series::Forward{problem, address(packed), packed_size};
    }
    for (const auto& [value, bytes] : Series::reads(call)) expect_operand(name, value, bytes, &values);
    values.push_back({true, Series::result_bytes(call)});
    calls.push_back(call);
  }
  if (outputs.empty()) throw py::value_error("outputs is empty, expected at least one");
  for (int output : outputs)
    if (output < inputs || static_cast<size_t>(output) >= values.size())
      throw py::value_error("outputs has value " + std::to_string(output) + ", which is no call's result");
  return Series(calls, inputs, outputs);
}

void run_series(const Series& series, const std::vector<uintptr_t>& inputs, const std::vector<uintptr_t>& outputs) {
  if (inputs.size() != series.inputs() || outputs.size() != series.outputs())
    throw py::value_error("inputs and outputs have " + std::to_string(inputs.size()) + " and " +
                          std::to_string(outputs.size()) + " addresses, expected " + std::to_string(series.inputs()) +
                          " and " + std::to_string(series.outputs()));
  const Isa isa = fast_isa("");
  std::vector<const void*> from;
  std::vector<void*> to;
  for (uintptr_t input : inputs) from.push_back(address(input));
  for (size_t i = 0; i < outputs.size(); ++i) {
    to.push_back(mutable_address(outputs[i]));
    expect_writes(to.back(), series.output_size(i));
  }
  const auto ask = [&](int threads, size_t* bytes) { return series.workspace_bytes(isa, threads, bytes); };
  run_in_workspace(ask, [&](void* memory, size_t bytes, const Executor& executor) {
    return series.run(isa, from.data(), to.data(), memory, bytes, executor);
  });
  last_isa = isa;
}

void backward_plain(const py::tuple& fields, const std::string& isa_name, uintptr_t input, uintptr_t depthwise_weight,
                    uintptr_t depthwise_bias, uintptr_t pointwise_weight, uintptr_t saved, uintptr_t grad_output,
                    uintptr_t grad_input, uintptr_t grad_depthwise_weight, uintptr_t grad_depthwise_bias,
                    uintptr_t grad_pointwise_weight, uintptr_t grad_bias) {
  const Problem problem = to_problem(fields);
  const Isa isa = fast_isa(isa_name);
  const Weights weights = to_weights(depthwise_weight, depthwise_bias, pointwise_weight, 0);
  const Gradients gradients =
      to_gradients(grad_input, grad_depthwise_weight, grad_depthwise_bias, grad_pointwise_weight, grad_bias);
  expect_writes(gradients.input, input_bytes(problem));
  const auto ask = [&](int threads, size_t* bytes) {
    return backward_workspace_bytes(problem, isa, threads, gradients, bytes);
  };
  run_in_workspace(ask, [&](void* memory, size_t bytes, const Executor& executor) {
    return backward(problem, isa, address(input), weights, address(saved), address(grad_output), gradients, memory,
                    bytes, executor);
  });
  last_isa = isa;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Native core of fastsep; see _core.pyi.";
  m.def("isas", [] { return isa_names(true); });
  m.def("compiled_isas", [] { return isa_names(false); });
  m.def("best_isa", [] { return std::string(isa_name(to_isa(""))); });
  m.def("last_isa", [] { return last_isa == Isa::best ? std::string() : std::string(isa_name(last_isa)); });
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (int32_t i = 0; i < kernel_count(); ++i) names.push_back(kernel_name(i));
    return names;
  });
  m.def("set_thread_pool", [](uintptr_t parallel_for, uintptr_t num_threads) {
    lend_torch_pool(reinterpret_cast<TorchParallelFor>(parallel_for), reinterpret_cast<TorchNumThreads>(num_threads));
  });
  m.def("thread_pool", [] { return torch_pool_lent() ? "torch" : "own"; });
  m.def("set_num_threads", &set_num_threads);
  py::class_<Series>(m, "Series")
      .def(py::init(&to_series), py::arg("calls"), py::arg("inputs"), py::arg("outputs"))
      .def("run", &run_series, py::arg("inputs"), py::arg("outputs"));
  m.def("lend_tensors", &lend_tensors, py::kw_only(), py::arg("functions"), py::arg("base"), py::arg("plain"),
        py::arg("strided"), py::arg("examples"));
  define_stored(m);
  py::class_<Snapshot>(m, "Snapshot")
      .def(py::init<const py::sequence&>(), py::arg("tensors"))
      .def("holds", &Snapshot::holds)
      .def("matches", [](const Snapshot& snapshot, const py::args& tensors) {
        return snapshot.matches({tensors.begin(), tensors.end()});
      });
  py::class_<Unchanged>(m, "Unchanged")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>(), py::kw_only(),
           py::arg("held"), py::arg("partly"), py::arg("slots"), py::arg("tensors"))
      .def("set_surroundings", &Unchanged::set_surroundings, py::kw_only(), py::arg("empty"), py::arg("held"),
           py::arg("modeless"))
      .def("holds", &Unchanged::holds);
  m.def("packed_bytes", [](const py::tuple& fields, const std::string& isa) {
    size_t bytes = 0;
    check(packed_bytes(to_problem(fields), fast_isa(isa), &bytes));
    return bytes;
  });
  m.def(
      "pack",
      [](const py::tuple& fields, const std::string& isa, uintptr_t depthwise_weight, uintptr_t depthwise_bias,
         uintptr_t pointwise_weight, uintptr_t bias, uintptr_t packed, size_t packed_size, uintptr_t expand_weight,
         uintptr_t expand_bias) {
        const Weights weights =
            to_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias);
        check(
            pack(to_problem(fields), fast_isa(isa), weights, mutable_address(packed), packed_size, current_executor()));
      },
      py::arg("problem"), py::arg("isa"), py::arg("depthwise_weight"), py::arg("depthwise_bias"),
      py::arg("pointwise_weight"), py::arg("bias"), py::arg("packed"), py::arg("packed_size"),
      py::arg("expand_weight") = 0, py::arg("expand_bias") = 0);
  m.def("forward", &forward_plain, py::arg("problem"), py::arg("isa"), py::arg("input"), py::arg("depthwise_weight"),
        py::arg("depthwise_bias"), py::arg("pointwise_weight"), py::arg("bias"), py::arg("output"),
        py::arg("expand_weight") = 0, py::arg("expand_bias") = 0);
  m.def("forward_packed", &forward_packed, py::arg("problem"), py::arg("isa"), py::arg("input"), py::arg("packed"),
        py::arg("packed_size"), py::arg("output"), py::arg("gate") = 0, py::arg("residual") = 0);
  m.def(
      "reference_forward",
      [](const py::tuple& fields, uintptr_t input, uintptr_t depthwise_weight, uintptr_t depthwise_bias,
         uintptr_t pointwise_weight, uintptr_t bias, uintptr_t output, bool magnitude, uintptr_t expand_weight,
         uintptr_t expand_bias) {
        const Problem problem = to_problem(fields);
        const Weights weights =
            to_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias);
        py::gil_scoped_release release;
        reference_forward(problem, address(input), weights, static_cast<double*>(mutable_address(output)), magnitude);
      },
      py::arg("problem"), py::arg("input"), py::arg("depthwise_weight"), py::arg("depthwise_bias"),
      py::arg("pointwise_weight"), py::arg("bias"), py::arg("output"), py::arg("magnitude") = false,
      py::arg("expand_weight") = 0, py::arg("expand_bias") = 0);
  m.def("backward", &backward_plain);
  m.def("derivative_from_output", [](int32_t activation) {
    if (activation < 0 || activation >= activation_count) throw py::value_error("unknown activation number");
    return derivative_from_output(static_cast<Activation>(activation));
  });
  m.def(
      "reference_backward",
      [](const py::tuple& fields, uintptr_t input, uintptr_t depthwise_weight, uintptr_t depthwise_bias,
         uintptr_t pointwise_weight, uintptr_t bias, uintptr_t grad_output, uintptr_t grad_input,
         uintptr_t grad_depthwise_weight, uintptr_t grad_depthwise_bias, uintptr_t grad_pointwise_weight,
         uintptr_t grad_bias, bool magnitude) {
        const Problem problem = to_problem(fields);
        const Weights weights = to_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias);
        const Gradients gradients =
            to_gradients(grad_input, grad_depthwise_weight, grad_depthwise_bias, grad_pointwise_weight, grad_bias);
        py::gil_scoped_release release;
        reference_backward(problem, address(input), weights, address(grad_output), gradients, magnitude);
      },
      py::arg("problem"), py::arg("input"), py::arg("depthwise_weight"), py::arg("depthwise_bias"),
      py::arg("pointwise_weight"), py::arg("bias"), py::arg("grad_output"), py::arg("grad_input"),
      py::arg("grad_depthwise_weight"), py::arg("grad_depthwise_bias"), py::arg("grad_pointwise_weight"),
      py::arg("grad_bias"), py::arg("magnitude") = false);
  m.def("fma_peak", [](const std::string& isa, int32_t dtype, double seconds) {
    if (dtype != 0 && dtype != 1) throw py::value_error("dtype is 0 for float32 or 1 for float64");
    double flops = 0;
    const Isa chosen = fast_isa(isa);
    py::gil_scoped_release release;
    check(fma_peak(chosen, static_cast<Dtype>(dtype), seconds, &flops));
    return flops;
  });
  m.def("memory_bandwidth", [](size_t bytes, double seconds) {
    const Executor executor = current_executor();
    py::gil_scoped_release release;
    const std::unique_ptr<char[]> buffer(new char[bytes]);
    double speed = 0;
    check(memory_bandwidth(buffer.get(), bytes, seconds, executor, &speed));
    return speed;
  });
}
