// Random problems on every kernel that this processor has, and on models of those for AVX-512 and NEON. Each run draws
// anew; a failure says how to see it again.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>

#include "../harness.h"
#include "sweep.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FASTSEP_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef FASTSEP_HAVE_MODELS
namespace fastsep {
extern const Kernel separable_f32_model_avx512, separable_f64_model_avx512;
extern const Kernel separable_f32_model_neon, separable_f64_model_neon;
}  // namespace fastsep
#endif

namespace fastsep_tests {

using namespace fastsep;

std::string current_line;

namespace {

const Kernel* const all_kernels[] = {
#define FASTSEP_KERNEL(isa, dtype) &separable_##dtype##_##isa,
#include "cpu/kernels.inc"
#undef FASTSEP_KERNEL
};
const std::vector<const Kernel*> models = {
#ifdef FASTSEP_HAVE_MODELS
    &separable_f32_model_avx512, &separable_f64_model_avx512, &separable_f32_model_neon, &separable_f64_model_neon
#endif
};

// Multiply-adds of one problem at most: a tenth of a second. An emulator takes twenty times as long.
constexpr double plain_products = 60e6;

struct Options {
  double seconds = 30;
  double products = plain_products;
  int64_t sizes = 0, problem = -1;
  uint64_t seed = std::random_device()();
  std::vector<std::string> kernels;  // parts of their names; none for all
};

Options options;
int64_t number, failures;

// What to run to see the current problem again.
std::string replay() {
  char products[32] = "";
  if (options.products != plain_products) std::snprintf(products, sizeof products, " --products %g", options.products);
  return (options.sizes > 0 ? "--sizes 1 --seed " : "--seed ") + std::to_string(options.seed) + " --problem " +
         std::to_string(number) + products;
}

void say_where() {
  const std::string message = "FAILED and ended: " + replay() + "\n  " + current_line + "\n";
  const ssize_t ignored = write(STDERR_FILENO, message.data(), message.size());
  static_cast<void>(ignored);
}

extern "C" void crashed(int) {
  say_where();
  _exit(1);
}

// What ends the program is a failure of the current problem.
void watch_for_crashes() {
#ifdef FASTSEP_SANITIZED
  __sanitizer_set_death_callback(say_where);
#else
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) ::signal(signal, crashed);
#endif
}

// A model that is not like its original would prove nothing.
bool models_are_alike() {
  for (const Kernel* model : models) {
    const Kernel* const kernel = find_kernel(model->isa, model->dtype);
    if (kernel == nullptr) continue;  // of another family of processors
    if (std::memcmp(&kernel->shape, &model->shape, sizeof(KernelShape)) == 0) continue;
    std::cerr << "FAILED: " << model->name << " has other tiles than " << kernel->name << "\n";
    return false;
  }
  return true;
}

std::vector<const Kernel*> kernels_of(const Options& wanted) {
  std::vector<const Kernel*> kernels;
  const auto add = [&](const Kernel* kernel) {
    const std::string name = kernel->name;
    bool is_wanted = wanted.kernels.empty();
    for (const std::string& part : wanted.kernels) is_wanted |= name.find(part) != std::string::npos;
    if (is_wanted) kernels.push_back(kernel);
  };
  for (const Kernel* kernel : all_kernels)
    if (isa_available(kernel->isa)) add(kernel);
  for (const Kernel* model : models) add(model);
  return kernels;
}

bool parse(int argc, char** argv) {
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) return false;
    const std::string key = argv[i];
    char* end = argv[i + 1];
    if (key == "--seconds")
      options.seconds = std::strtod(argv[i + 1], &end);
    else if (key == "--products")
      options.products = std::strtod(argv[i + 1], &end);
    else if (key == "--sizes")
      options.sizes = std::strtoll(argv[i + 1], &end, 10);
    else if (key == "--seed")
      options.seed = std::strtoull(argv[i + 1], &end, 10);
    else if (key == "--problem")
      options.problem = std::strtoll(argv[i + 1], &end, 10);
    else if (key == "--kernel")
      options.kernels.push_back(argv[i + 1]), end = argv[i + 1] + std::strlen(argv[i + 1]);
    else
      return false;
    if (end == argv[i + 1] || *end != '\0') return false;
  }
  return true;
}

int64_t try_all_sizes(const std::vector<const Kernel*>& kernels) {
  int64_t valid = 0;
  const int64_t begin = options.problem >= 0 ? options.problem : 0;
  for (number = begin; valid < options.sizes; ++number)
    valid +=
        try_sizes(kernels, seed_of(options.seed, static_cast<uint64_t>(number)), static_cast<int>(number % 64 + 1));
  return valid;
}

int64_t try_problems(const std::vector<const Kernel*>& kernels) {
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  const auto goes_on = [&](int64_t count) {
    if (options.problem >= 0) return count == 0;
    return std::chrono::duration<double>(clock::now() - start).count() < options.seconds;
  };
  std::vector<const Kernel*> listed;
  for (const Kernel* kernel : kernels)
    if (find_kernel(kernel->isa, kernel->dtype) == kernel) listed.push_back(kernel);
  int64_t count = 0;
  for (number = options.problem >= 0 ? options.problem : 0; goes_on(count); ++number, ++count) {
    const uint64_t seed = seed_of(options.seed, static_cast<uint64_t>(number));
    // Models take many times as long: of four problems they get one.
    const bool with_models = number % 4 == 0 || listed.empty();
    number % 16 == 15 ? try_series(listed, seed) : try_problem(with_models ? kernels : listed, seed, options.products);
  }
  return count;
}

int run() {
  const std::vector<const Kernel*> kernels = kernels_of(options);
  if (!models_are_alike() || kernels.empty()) return 1;
  watch_for_crashes();
  std::cout << "seed " << options.seed << ", kernels";
  for (const Kernel* kernel : kernels) std::cout << ' ' << kernel->name;
  std::cout << std::endl;
  const int64_t count = options.sizes > 0 ? try_all_sizes(kernels) : try_problems(kernels);
  std::cout << count << (options.sizes > 0 ? " problems' sizes, " : " problems, ") << failures << " failures\n";
  // As a test's last line.
  std::cout << (failures == 0 && count > 0 ? "1 passed, 0 failed\n" : "0 passed, 1 failed\n");
  return failures == 0 && count > 0 ? 0 : 1;
}

}  // namespace

// What the tests of the table share with the sweep says what is wrong through this.
void expect(bool good, const Kernel& kernel, const Case& c, const Problem&, const std::string& what) {
  if (!good) fail(kernel.name, what + ": " + c.line);
}

uint64_t seed_of(uint64_t seed, uint64_t number) {
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(number),
                         static_cast<uint32_t>(number >> 32)};
  uint32_t words[2];
  sequence.generate(words, words + 2);
  return uint64_t{words[0]} << 32 | words[1];
}

void fail(const std::string& kernel, const std::string& what) {
  ++failures;
  std::cerr << "FAILED " << kernel << ": " << what << "\n  " << replay() << "\n  " << current_line << std::endl;
  if (failures < 20) return;
  std::cerr << "too many failures\n";
  std::exit(1);
}

}  // namespace fastsep_tests

int main(int argc, char** argv) {
  if (!fastsep_tests::parse(argc, argv)) {
    std::cerr << "usage: fastsep_sweep [--seconds S] [--products N] [--sizes COUNT] [--seed N] [--problem I] [--kernel "
                 "NAME] ...\n";
    return 2;
  }
  return fastsep_tests::run();
}
