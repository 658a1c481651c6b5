#include "driver.h"

#include "plan.h"

namespace fastsep {
namespace {

struct Job {
  const ForwardPlan* plan;
  void (*work)(const ForwardPlan& plan, const Tile& tile, void* scratch);
  Tile (*tile_of)(const ForwardPlan& plan, int64_t unit);
  int64_t units, slots;
  char* workspace;
};

// A slot is a thread's share of the units, with scratch of its own.
void run_slot(void* context, int64_t slot) {
  const Job& job = *static_cast<const Job*>(context);
  char* scratch = job.workspace + slot * job.plan->scratch_bytes;
  const int64_t end = part(job.units, job.slots, slot + 1);
  for (int64_t unit = part(job.units, job.slots, slot); unit < end; ++unit)
    job.work(*job.plan, job.tile_of(*job.plan, unit), scratch);
}

}  // namespace

void run_on(const Executor& executor, int64_t count, void (*body)(void*, int64_t), void* context) {
  if (executor.run != nullptr && executor.threads > 1 && count > 1)
    return executor.run(executor.state, count, body, context);
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

size_t scratch_size(const Problem& problem, const Kernel& kernel, int threads) {
  const ForwardPlan plan = make_plan(problem, kernel, threads);
  return static_cast<size_t>(plan.scratch_bytes * threads + plan.shared_bytes * problem.batch);
}

void run_forward(const Problem& problem, const Kernel& kernel, const Inputs& inputs, const void* packed, void* output,
                 void* workspace, const Executor& executor) {
  ForwardPlan plan = make_plan(problem, kernel, executor.threads);
  plan.input = inputs.x;
  plan.gate = inputs.gate;
  plan.residual = inputs.residual != nullptr ? inputs.residual : inputs.x;
  plan.packed = packed_weights(packed);
  plan.output = output;
  plan.shared = static_cast<char*>(workspace) + plan.scratch_bytes * executor.threads;
  const auto run = [&](auto work, auto tile_of, int64_t units) {
    Job job = {&plan, work, tile_of, units, least(units, executor.threads), static_cast<char*>(workspace)};
    run_on(executor, job.slots, run_slot, &job);
  };
  if (plan.channel_tiles > 0) run(kernel.forward_channels, channels_of, channel_tile_count(plan));
  run(kernel.forward_tile, tile_of, tile_count(plan));
}

}  // namespace fastsep
