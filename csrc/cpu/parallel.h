// Threads for the native kernels.
//
// torch's OpenMP runtime, already loaded in a process that uses torch, is borrowed when it is there: a second
// pool of threads would compete with torch's, whose workers spin for a while after each operator.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>

namespace poc::cpu {

// Run body(context) on up to `threads` threads, this one among them, and wait for all.
void run_team(int threads, void (*body)(void*), void* context);

// Which runtime run_team uses: "OpenMP (path)" or "std::thread".
const char* team_runtime();

// Round to nearest even, subnormals kept, traps masked; what was set before comes back at the end of the
// scope.
class FloatEnvironment {
 public:
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// body(task, slot) for each task in [0, tasks), in any order; slot < threads is the same for no two at a
// time.
template <class Body>
void parallel_for(int threads, int64_t tasks, const Body& body) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    FloatEnvironment environment;
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  struct Team {
    const Body& body;
    int64_t tasks;
    std::atomic<int64_t> next_task{0};
    std::atomic<int> next_slot{0};
  } team{body, tasks};
  run_team(
      threads,
      [](void* context) {
        Team& shared = *static_cast<Team*>(context);
        FloatEnvironment environment;
        const int slot = shared.next_slot.fetch_add(1);
        for (int64_t task; (task = shared.next_task.fetch_add(1)) < shared.tasks;) shared.body(task, slot);
      },
      &team);
}

}  // namespace poc::cpu
