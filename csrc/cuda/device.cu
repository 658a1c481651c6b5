// What there is to run on, and the words for what went wrong there.
#include "common.cuh"

namespace fastsep {
namespace cuda {

int32_t device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // no driver, or one too old: nothing that a later call should hear of
  return 0;
}

const char* describe_cuda(int32_t cuda_error) { return cudaGetErrorString(static_cast<cudaError_t>(cuda_error)); }

}  // namespace cuda
}  // namespace fastsep
