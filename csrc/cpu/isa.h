// Which instruction sets this processor runs, and which one FASTSEP_ISA asks for.
#pragma once

#include "../fastsep.h"

namespace fastsep {

// Whether the processor and the operating system support it, compiled in or not.
bool isa_supported(Isa isa);

}  // namespace fastsep
