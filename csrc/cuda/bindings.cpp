// The Python module _cuda: integers in, errors as exceptions. It loads where there is no driver.
#include "../bindings.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "../fastsep_cuda.h"

namespace py = pybind11;
using namespace fastsep;

namespace {

std::atomic<int> pretended_multiprocessors{0};

cuda::Queue queue_of(int device, uintptr_t stream) {
  return {device, mutable_address(stream), pretended_multiprocessors.load(std::memory_order_relaxed)};
}

Problem to_problem(const py::tuple& fields) {
  const Problem problem = read_problem(fields);
  check(cuda::validate(problem));
  return problem;
}

// Makes a device current for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

std::string sentence(const char* call, const Problem& p, int device, int32_t error) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  const char* dtypes[] = {"float32", "float64", "float16", "bfloat16"};
  return std::string("CUDA error in the ") + call + " pass on device " + text(device) + ", " +
         cuda::describe_cuda(error) + ": for the " + dtypes[static_cast<int32_t>(p.dtype)] + " input [" +
         text(p.batch) + ", " + text(p.channels) + ", " + text(p.height) + ", " + text(p.width) + "], " +
         text(p.out_channels) + " output channels and a kernel of " + text(p.kernel_h) + " x " + text(p.kernel_w);
}

// Runs a call on its device without the lock of the interpreter. What went wrong is also taken off the runtime's own
// record, where the next call would find it and believe it its own.
template <class Call>
void run(const char* name, const Problem& problem, int device, Call call) {
  cuda::Outcome outcome = {Status::ok, 0};
  {
    py::gil_scoped_release release;
    const DeviceGuard guard(device);
    outcome.cuda_error = guard.error();
    if (outcome.cuda_error == 0) outcome = call();
    if (outcome.cuda_error != 0) static_cast<void>(cudaGetLastError());
  }
  check(outcome.status);
  if (outcome.cuda_error != 0) throw std::runtime_error(sentence(name, problem, device, outcome.cuda_error));
}

cuda::ForwardKernel kernel_of(int number) {
  switch (number) {
    case 0: return cuda::ForwardKernel::portable;
    case 1: return cuda::ForwardKernel::hopper;
    default: throw py::value_error("kernel must be 0 or 1, got " + std::to_string(number));
  }
}

void run_forward(const py::tuple& fields, bool tf32, int kernel, uintptr_t input, uintptr_t depthwise_weight,
                 uintptr_t depthwise_bias, uintptr_t pointwise_weight, uintptr_t bias, uintptr_t output,
                 uintptr_t workspace, size_t workspace_size, int device, uintptr_t stream) {
  const Problem problem = to_problem(fields);
  const Weights weights = {address(depthwise_weight), address(depthwise_bias), address(pointwise_weight),
                           address(bias)};
  const cuda::Options options = {tf32, kernel_of(kernel)};
  run("forward", problem, device, [&] {
    return cuda::forward(problem, options, address(input), weights, mutable_address(output), mutable_address(workspace),
                         workspace_size, queue_of(device, stream));
  });
}

void run_backward(const py::tuple& fields, bool tf32, uintptr_t input, uintptr_t depthwise_weight,
                  uintptr_t depthwise_bias, uintptr_t pointwise_weight, uintptr_t saved, uintptr_t grad_output,
                  uintptr_t grad_input, uintptr_t grad_depthwise_weight, uintptr_t grad_depthwise_bias,
                  uintptr_t grad_pointwise_weight, uintptr_t grad_bias, uintptr_t workspace, size_t workspace_size,
                  int device, uintptr_t stream) {
  const Problem problem = to_problem(fields);
  const Weights weights = {address(depthwise_weight), address(depthwise_bias), address(pointwise_weight), nullptr};
  const Gradients gradients =
      to_gradients(grad_input, grad_depthwise_weight, grad_depthwise_bias, grad_pointwise_weight, grad_bias);
  run("backward", problem, device, [&] {
    return cuda::backward(problem, {tf32}, address(input), weights, address(saved), address(grad_output), gradients,
                          mutable_address(workspace), workspace_size, queue_of(device, stream));
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of fastsep; see _cuda.pyi.";
  m.def("device_count", &cuda::device_count);
  m.def("architectures", [] { return FASTSEP_CUDA_ARCHITECTURES; });
  m.def("runtime_version", [] { return CUDART_VERSION; });
  m.def("pretend_multiprocessors", [](int count) {
    if (count < 0) throw py::value_error("count must be at least 0, got " + std::to_string(count));
    pretended_multiprocessors = count;
  });
  m.def("derivative_from_output", [](int32_t activation) {
    if (activation < 0 || activation >= activation_count) throw py::value_error("unknown activation number");
    return derivative_from_output(static_cast<Activation>(activation));
  });
  m.def("why_refused", [](const py::tuple& fields) {
    const Status status = cuda::validate(read_problem(fields));
    return std::string(status == Status::ok ? "" : describe(status));
  });
  m.def("forward_kernel_name",
        [](const py::tuple& fields, bool tf32) { return cuda::forward_kernel_name(to_problem(fields), {tf32}); });
  m.def("forward_workspace_bytes", [](const py::tuple& fields, bool tf32) {
    size_t bytes = 0;
    check(cuda::forward_workspace_bytes(to_problem(fields), {tf32}, &bytes));
    return bytes;
  });
  m.def("forward", &run_forward);
  m.def("has_hopper_kernel", [](const py::tuple& fields, int device) {
    const Problem problem = read_problem(fields);
    const DeviceGuard guard(device);
    if (guard.error() == cudaSuccess) return cuda::has_hopper_kernel(problem, device);
    static_cast<void>(cudaGetLastError());
    return false;
  });
  m.def("backward_workspace_bytes",
        [](const py::tuple& fields, bool tf32, uintptr_t grad_input, uintptr_t grad_depthwise_weight,
           uintptr_t grad_depthwise_bias, uintptr_t grad_pointwise_weight, uintptr_t grad_bias) {
          size_t bytes = 0;
          const Gradients gradients =
              to_gradients(grad_input, grad_depthwise_weight, grad_depthwise_bias, grad_pointwise_weight, grad_bias);
          check(cuda::backward_workspace_bytes(to_problem(fields), {tf32}, gradients, &bytes));
          return bytes;
        });
  m.def("backward", &run_backward);
}
