// How a problem is cut into units of work for some threads, and the memory that these take.
#pragma once

#include "kernel.h"

namespace fastsep {

ForwardPlan make_plan(const Problem& problem, const Kernel& kernel, int threads);

// The tiles of kernel.forward_tile(): tile `unit` of so many.
int64_t tile_count(const ForwardPlan& plan);
Tile tile_of(const ForwardPlan& plan, int64_t unit);

// Those of kernel.forward_channels(), the first of two passes; none where there is but one.
int64_t channel_tile_count(const ForwardPlan& plan);
Tile channels_of(const ForwardPlan& plan, int64_t unit);

BackwardPlan make_plan(const Problem& problem, const Kernel& kernel, const Gradients& gradients, int threads);

// The units of kernel.backward_work(), each with scratch of its own.
int64_t slot_count(const BackwardPlan& plan);
BackwardWork work_of(const BackwardPlan& plan, int64_t slot);
// What all units share.
int64_t packed_bytes(const BackwardPlan& plan);
int64_t sums_bytes(const BackwardPlan& plan);

}  // namespace fastsep
