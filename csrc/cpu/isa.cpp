#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "kernel.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <initializer_list>
#endif

namespace fastsep {
namespace {

const char* const names[isa_count] = {"avx512", "avx2", "neon", "scalar"};

#if defined(__aarch64__)
// NEON is in every such processor, but the operating system may have been told not to use it.
bool neon_supported() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0;
#elif defined(__APPLE__)
  // The second is its name in macOS 11.
  for (const char* name : {"hw.optional.AdvSIMD", "hw.optional.neon"}) {
    int has = 0;
    size_t size = sizeof(has);
    if (sysctlbyname(name, &has, &size, nullptr, 0) == 0) return has != 0;
  }
  return false;
#else
  return true;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  const int32_t index = static_cast<int32_t>(isa);
  return index >= 0 && index < isa_count ? names[index] : "best";
}

bool isa_from_name(const char* name, Isa* isa) {
  // Names are ASCII, and of whatever case in the environment.
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  const auto is_named = [&](const char* known) {
    size_t at = 0;
    while (known[at] != '\0' && lower(name[at]) == known[at]) ++at;
    return known[at] == '\0' && name[at] == '\0';
  };
  for (int32_t i = 0; i < isa_count; ++i) {
    if (is_named(names[i])) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(__x86_64__) || defined(__i386__)
    // The compiler's run-time library asks the processor (cpuid) and the operating system (xgetbv).
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(__aarch64__)
    case Isa::neon: return neon_supported();
#endif
    default: return false;
  }
}

bool isa_compiled(Isa isa) { return find_kernel(isa, Dtype::f32) != nullptr; }

bool isa_available(Isa isa) { return isa_supported(isa) && isa_compiled(isa); }

Status best_isa(Isa* isa) {
  const char* forced = std::getenv("FASTSEP_ISA");
  if (forced != nullptr && *forced != '\0')
    return isa_from_name(forced, isa) && isa_available(*isa) ? Status::ok : Status::unsupported_isa;
  for (int32_t i = 0; i < isa_count; ++i) {
    *isa = static_cast<Isa>(i);
    if (isa_available(*isa)) return Status::ok;
  }
  return Status::unsupported_isa;
}

}  // namespace fastsep
